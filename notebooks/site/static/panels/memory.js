/* The bytes of a training step, from the polynomials in rows and tokens that were traced. */

peftlab.panels.memory = (data) => {
  const { fixed, readableBytes } = peftlab.numbers;
  const { models, virtual, full, shown, mould } = data;

  /* The coefficients of 1, T, T², B, B T, B T². */
  function value([a, b, c, d, e, f], rows, tokens) {
    return a + tokens * (b + tokens * c) + rows * (d + tokens * (e + tokens * f));
  }

  const most = (lines, rows, tokens) => Math.max(...lines.map((l) => value(l, rows, tokens)));

  /* By method: bytes of each part, and the most around the loss and at the update. */
  function steps({ model, rows, tokens }) {
    const found = {};
    for (const [label, told] of Object.entries(models[model].traces)) {
      const step = {};
      for (const part of ["weights", "aside", "optimiser", "gradients", "activations"]) {
        step[part] = value(told[part], rows, tokens);
      }
      step.at_loss = Math.max(
        most(told.forward, rows, tokens),
        most(told.backward, rows, tokens),
      );
      step.at_update = most(told.step, rows, tokens);
      found[label] = step;
    }
    return found;
  }

  /* The most at any time, without what is kept aside to undo full fine-tuning. */
  const peak = (step) => Math.max(step.at_loss, step.at_update) - step.aside;

  function text(state) {
    const found = steps(state);
    const times = shown.map(({ label, word }) => {
      return `${fixed(peak(found[full]) / peak(found[label]), 2)} times ${word}`;
    });
    return (
      `${readableBytes(peak(found[full]))} for full fine-tuning of ${state.model}` +
      ` at ${state.rows} × ${state.tokens} tokens: ${times.join(", ")}`
    );
  }

  function figure(state) {
    const bars = structuredClone(mould);
    const found = Object.values(steps(state));
    const parts = {
      weights: (step) => [step.weights, step.weights],
      "Adam's moments": (step) => [step.optimiser, step.optimiser],
      gradients: (step) => [0, step.gradients],
      activations: (step) => [step.activations, 0],
      "around the loss": (step) => [
        step.at_loss - step.aside - step.weights - step.optimiser - step.activations,
        0,
      ],
    };
    for (const trace of bars.data) trace.y = found.flatMap(parts[trace.name]);
    bars.layout.title.text = text(state);
    return bars;
  }

  const lengths = (model) => data.tokens.filter((n) => n <= models[model].context - virtual);

  function allowed(state) {
    const offered = lengths(state.model);
    const tokens = Math.max(offered[0], ...offered.filter((n) => n <= state.tokens));
    return { ...state, tokens };
  }

  const controls = (state) => [
    { name: "model", label: "model", choose: Object.keys(models) },
    { name: "rows", label: "rows", slide: data.rows },
    { name: "tokens", label: "tokens a row", slide: lengths(state.model) },
  ];

  return { steps, peak, text, figure, allowed, controls };
};
