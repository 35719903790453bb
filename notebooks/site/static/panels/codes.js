/* Weights as codes of four bits: the arithmetic of peftlab.quantisation, in 32 bits where it is. */

peftlab.panels.codes = (data) => {
  const { array, fixed, percent } = peftlab.numbers;
  const { fround } = Math;
  const kept = {}; // weights that are unpacked, and errors that are known

  const halfway = (levels) => levels.slice(1).map((b, i) => fround(fround(levels[i] + b) / 2));

  /* The index of the nearest level; a value exactly halfway takes the lower one. */
  function nearest(value, between) {
    let [low, high] = [0, between.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (between[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /* Codes, and m = max|w| of every block; the last block may be short. */
  function blockwise(flat, size, levels) {
    const between = halfway(levels);
    const codes = new Uint8Array(flat.length);
    const scales = new Float32Array(Math.ceil(flat.length / size));
    for (let block = 0; block < scales.length; block++) {
      const [from, to] = [block * size, Math.min((block + 1) * size, flat.length)];
      let largest = 0;
      for (let i = from; i < to; i++) largest = Math.max(largest, Math.abs(flat[i]));
      scales[block] = largest;
      const inverse = fround(1 / Math.max(largest, data.tiny));
      for (let i = from; i < to; i++) {
        const scaled = Math.max(-1, Math.min(1, fround(flat[i] * inverse)));
        codes[i] = nearest(scaled, between);
      }
    }
    return { codes, scales };
  }

  /* The scales as codes of eight bits: their mean is taken off, and blocks of 256 share a scale. */
  function scalesInCodes(scales) {
    const mean = fround(scales.reduce((sum, m) => sum + m, 0) / scales.length);
    const centred = scales.map((m) => fround(m - mean));
    const { codes, scales: coarse } = blockwise(centred, data.group, data.dynamic);
    return scales.map((_, i) => {
      return fround(fround(data.dynamic[codes[i]] * coarse[Math.floor(i / data.group)]) + mean);
    });
  }

  /* The weights as they come back from their codes: m · T[c]. */
  function decoded(flat, { type, block, double }) {
    const levels = data.levels[type];
    const { codes, scales } = blockwise(flat, block, levels);
    const held = double ? scalesInCodes(scales) : scales;
    return Float32Array.from(codes, (code, i) => levels[code] * held[Math.floor(i / block)]);
  }

  function weights(name) {
    return (kept[name] ??= array(data.weights[name]));
  }

  /* RMS error as a part of the RMS of the weights. */
  function error(state) {
    const key = JSON.stringify([state.weight, state.type, state.block, state.double]);
    if (!(key in kept)) {
      const flat = weights(state.weight);
      const back = decoded(flat, state);
      let [off, all] = [0, 0];
      for (let i = 0; i < flat.length; i++) {
        off += (back[i] - flat[i]) ** 2;
        all += flat[i] ** 2;
      }
      kept[key] = Math.sqrt(off / all);
    }
    return kept[key];
  }

  /* 4 + 32/B, or with scales in codes 4 + 8/B + 32/(256 B). */
  const bits = ({ block, double }) => 4 + (double ? 8 + 32 / data.group : 32) / block;

  const blocks = (weight) => data.blocks.filter((size) => weights(weight).length % size === 0);

  function text(state) {
    return (
      `${state.type}, blocks of ${state.block}: ${fixed(bits(state), 3)} bits a weight,` +
      ` error ${percent(error(state), 1)} of the weights' size`
    );
  }

  function figure(state) {
    const figure = structuredClone(data.moulds[state.type]);
    const sizes = blocks(state.weight);
    for (const trace of figure.data) {
      const type = trace.name;
      const [small, large] = data.marks;
      trace.x = sizes;
      trace.y = sizes.map((block) => 100 * error({ ...state, type, block }));
      trace.marker.size = sizes.map((block) => {
        return type === state.type && block === state.block ? large : small;
      });
    }
    figure.layout.xaxis.tickvals = sizes;
    figure.layout.xaxis.ticktext = sizes.map((block) => {
      return `${block}<br>${fixed(bits({ ...state, block }), 3)}`;
    });
    figure.layout.title.text = `${state.weight}: ${text(state)}`;
    return figure;
  }

  function allowed(state) {
    const offered = blocks(state.weight);
    const block = Math.max(offered[0], ...offered.filter((size) => size <= state.block));
    return { ...state, block };
  }

  const controls = (state) => [
    { name: "weight", label: "weight", choose: Object.keys(data.weights) },
    { name: "type", label: "data type", choose: Object.keys(data.levels) },
    { name: "block", label: "block size", slide: blocks(state.weight) },
    { name: "double", label: "scales in 8 bits too", switch: true },
  ];

  return { weights, decoded, error, bits, blocks, text, figure, allowed, controls };
};
