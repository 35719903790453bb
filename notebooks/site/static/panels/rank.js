/* LoRA trained anew at every move: forty steps of Adam towards a known update ΔW. */

peftlab.panels.rank = (data) => {
  const { array, percent } = peftlab.numbers;
  const n = data.size;
  const target = array(data.target); // n × n, row by row
  const known = {};

  /* ΔW = s B A, for B (n, r) and A (r, n). */
  function product(B, A, r, s) {
    const out = new Float64Array(n * n);
    for (let i = 0; i < n; i++) {
      for (let k = 0; k < r; k++) {
        const b = s * B[i * r + k];
        for (let j = 0; j < n; j++) out[i * n + j] += b * A[k * n + j];
      }
    }
    return out;
  }

  /* Singular values of an n × n matrix, largest first: its columns are turned against each other
   * until all are orthogonal, and are then as long as the values. */
  function singularValues(matrix) {
    const columns = Array.from({ length: n }, (_, j) =>
      Float64Array.from({ length: n }, (_, i) => matrix[i * n + j]),
    );
    const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
    for (let sweep = 0, moved = true; moved && sweep < 60; sweep++) {
      moved = false;
      for (let p = 0; p < n; p++) {
        for (let q = p + 1; q < n; q++) {
          const [a, b] = [columns[p], columns[q]];
          const [aa, bb, ab] = [dot(a, a), dot(b, b), dot(a, b)];
          if (Math.abs(ab) <= 1e-12 * Math.sqrt(aa * bb)) continue;
          moved = true;
          const zeta = (bb - aa) / (2 * ab);
          const tangent = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
          const cosine = 1 / Math.hypot(1, tangent);
          const sine = cosine * tangent;
          for (let i = 0; i < n; i++) {
            [a[i], b[i]] = [cosine * a[i] - sine * b[i], sine * a[i] + cosine * b[i]];
          }
        }
      }
    }
    return columns.map((column) => Math.sqrt(dot(column, column))).sort((a, b) => b - a);
  }

  /* The loss ‖ΔW − s B A‖² / ‖ΔW‖² along the steps, and the singular values that were learned. */
  function trained({ r, alpha, scale }) {
    const s = alpha / (scale === data.scales[1] ? Math.sqrt(r) : r);
    const A = Float64Array.from(array(data.starts[r]));
    const B = new Float64Array(n * r);
    const moments = [A, B].map((p) => [new Float64Array(p.length), new Float64Array(p.length)]);
    const { beta1, beta2, eps } = data.adam;
    const all = target.reduce((sum, x) => sum + x * x, 0);
    const loss = [];
    for (let step = 1; ; step++) {
      const error = product(B, A, r, s).map((x, i) => target[i] - x);
      loss.push(error.reduce((sum, x) => sum + x * x, 0) / all);
      if (step > data.steps) break;
      const [gA, gB] = [new Float64Array(A.length), new Float64Array(B.length)];
      for (let i = 0; i < n; i++) {
        for (let k = 0; k < r; k++) {
          let sum = 0;
          for (let j = 0; j < n; j++) {
            sum += error[i * n + j] * A[k * n + j];
            gA[k * n + j] -= 2 * s * B[i * r + k] * error[i * n + j];
          }
          gB[i * r + k] = -2 * s * sum;
        }
      }
      [[A, gA], [B, gB]].forEach(([values, gradient], which) => {
        const [first, second] = moments[which];
        for (let i = 0; i < values.length; i++) {
          first[i] = beta1 * first[i] + (1 - beta1) * gradient[i];
          second[i] = beta2 * second[i] + (1 - beta2) * gradient[i] ** 2;
          const size = Math.sqrt(second[i] / (1 - beta2 ** step)) + eps;
          values[i] -= (data.rate * first[i]) / (1 - beta1 ** step) / size;
        }
      });
    }
    return { loss, learned: singularValues(product(B, A, r, s)).slice(0, r) };
  }

  function view(state) {
    return (known[JSON.stringify([state.r, state.alpha, state.scale])] ??= trained(state));
  }

  const squares = (values) => values.reduce((sum, x) => sum + x * x, 0);

  /* What the best matrix of rank r leaves: the squares of the singular values beyond r. */
  const floor = (r) => squares(data.wanted.slice(r)) / squares(data.wanted);

  function text(state) {
    const { loss } = view(state);
    const [start, end] = [loss[0], loss.at(-1)];
    const found =
      end <= start
        ? `${percent(1 - end, 0)} of the update learned, rank ${state.r} allows ` +
          percent(1 - floor(state.r), 0)
        : "the steps are too large: it ended worse than it began";
    return `r = ${state.r}, α = ${state.alpha}, ${state.scale}: ${found}`;
  }

  function figure(state) {
    const figure = structuredClone(data.mould);
    const [learned, wanted] = figure.data;
    const least = (values) => values.map((x) => Math.max(x, data.least));
    learned.y = least(view(state).learned);
    wanted.y = least(data.wanted);
    for (const trace of figure.data) trace.x = trace.y.map((_, i) => i + 1);
    figure.layout.title.text = text(state);
    return figure;
  }

  const controls = () => [
    { name: "r", label: "rank r", slide: data.ranks },
    { name: "alpha", label: "alpha", slide: data.alphas },
    { name: "scale", label: "scale", choose: data.scales },
  ];

  return { trained, view, floor, text, figure, allowed: (state) => state, controls };
};
