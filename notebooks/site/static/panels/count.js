/* What a method trains on a model, by the closed forms of peftlab.accounting. */

peftlab.panels.count = (data) => {
  const { readableBytes, readablePercent, whole } = peftlab.numbers;
  const { models, methods, moulds } = data;

  /* The formula of each kind of method: s, its size; m, the numbers of the model; o, its options. */
  const FORMULAS = {
    /* Σ r (d_in + d_out) over the target matrices */
    lora: (s, m, o, targets) =>
      targets
        .flatMap((target) => m.matrices[target])
        .reduce((sum, [copies, into, out]) => sum + copies * s * (into + out), 0),
    /* P d_model */
    prompt: (s, m) => s * m.d_model,
    /* P · 2 · attentions · d_kv */
    prefix: (s, m) => s * 2 * m.attentions * m.d_kv,
    /* P d_model, and the network that makes it, of PEFT's sizes: h = d_model */
    network(s, m, o) {
      const h = m.d_model;
      let total = s * m.d_model;
      let widths = [m.d_model, h, h, m.d_model];
      if (o.encoder === "lstm") {
        widths = [2 * h, 2 * h, m.d_model];
        for (let layer = 0; layer < o.layers; layer++) {
          const wide = layer ? 2 * h : m.d_model;
          total += 2 * (4 * h * (wide + h) + 8 * h);
        }
      }
      for (let i = 1; i < widths.length; i++) total += (widths[i - 1] + 1) * widths[i];
      return total;
    },
    /* 2 m d_model + m + d_model for each sublayer */
    bottleneck: (s, m, o) =>
      o.sublayers.reduce((sum, kind) => sum + m.sublayers[kind], 0) *
      (2 * s * m.d_model + s + m.d_model),
    full: (s, m) => m.parameters,
  };
  /* What is stored, where it is not what trains: the prompt that the network made. */
  const STORED = { network: FORMULAS.prompt };

  function parameters({ method, size, targets, model }) {
    const { formula, options } = methods[method];
    return FORMULAS[formula](size, models[model], options, targets);
  }

  function fileBytes({ method, size, targets, model }) {
    const { formula, options } = methods[method];
    const stored = STORED[formula] ?? FORMULAS[formula];
    return data.width * stored(size, models[model], options, targets);
  }

  /* The sizes that a slider offers: no rank above a target's smaller side, no prompt that fills
   * the context. */
  function sizes({ method, targets, model }) {
    const { sizes, targeted, in_context } = methods[method];
    let most = in_context ? models[model].context - 1 : Math.max(...sizes);
    if (targeted) {
      const sides = targets.flatMap((target) => models[model].matrices[target]);
      most = Math.min(...sides.flatMap(([, into, out]) => [into, out]));
    }
    return sizes.filter((size) => size <= most);
  }

  function text(state) {
    const [trained, all] = [parameters(state), models[state.model].parameters];
    return (
      `${whole(trained)} parameters · ${readablePercent(trained, all)} of ${state.model}` +
      ` · ${readableBytes(fileBytes(state))} in float32`
    );
  }

  function figure(state) {
    const { model, method, size } = state;
    const figure = structuredClone(moulds[method]);
    const [line, here, base] = figure.data;
    const all = models[model].parameters;
    line.x = sizes(state);
    line.y = line.x.map((other) => parameters({ ...state, size: other }));
    const now = parameters(state);
    [here.x, here.y, here.text] = [[size], [now], [whole(now)]];
    const [low, high] = [Math.min(...line.x), Math.max(...line.x)];
    [base.x, base.y] = [[low, high], [all, all]];
    const [note] = figure.layout.annotations;
    [note.x, note.y] = [Math.log10(low), Math.log10(all)];
    note.text = `all of ${model}: ${whole(all)}`;
    const share = readablePercent(now, all);
    figure.layout.title.text = `${method}: ${whole(now)} parameters, ${share} of ${model}`;
    figure.layout.yaxis.range = [Math.log10(Math.min(...line.y)) - 0.3, Math.log10(all) + 0.7];
    return figure;
  }

  /* The state nearest to the one wanted that the model and the method allow. */
  function allowed(wanted, before) {
    const { targeted, start } = methods[wanted.method];
    const state = { ...wanted };
    const has = Object.keys(models[state.model].matrices);
    state.targets = state.targets.filter((target) => has.includes(target));
    if (targeted && !state.targets.length) state.targets = has.slice(0, 1);
    if (before && methods[before.method].size_name !== methods[state.method].size_name) {
      state.size = start;
    }
    const offered = sizes(state);
    state.size = Math.max(offered[0], ...offered.filter((size) => size <= state.size));
    return state;
  }

  function controls(state) {
    const { size_name, targeted } = methods[state.method];
    const has = Object.keys(models[state.model].matrices);
    return [
      { name: "method", label: "method", choose: Object.keys(methods) },
      { name: "model", label: "model", choose: Object.keys(models) },
      { name: "size", label: size_name, slide: sizes(state), still: !methods[state.method].sized },
      ...(targeted ? [{ name: "targets", label: "targets", tick: has }] : []),
    ];
  }

  return { parameters, fileBytes, sizes, text, figure, allowed, controls };
};
