/* Numbers as Python writes them, and arrays as the site stores them. */

{
  const UNITS = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]];

  /* Python's format(x, ".{digits}f"): a number halfway between two goes to the even one. */
  function fixed(x, digits) {
    const usual = x.toFixed(digits);
    const [, rest] = x.toFixed(100).split(".");
    if (!/^50*$/.test(rest.slice(digits))) return usual;
    const below = x.toFixed(100).slice(0, digits - 100).replace(/\.$/, "");
    return Number(below.at(-1)) % 2 ? usual : below;
  }

  peftlab.numbers = {
    fixed,
    whole: (n) => n.toLocaleString("en-US"),
    percent: (share, digits) => `${fixed(100 * share, digits)}%`,

    /* The percentage with three significant digits. */
    readablePercent(part, whole) {
      const value = (100 * part) / whole;
      return `${fixed(value, Math.max(0, 2 - Math.floor(Math.log10(value))))}%`;
    },

    readableBytes(size) {
      const unit = UNITS.find(([least]) => size >= least);
      return unit ? `${fixed(size / unit[0], 1)} ${unit[1]}` : `${size} bytes`;
    },

    /* Numbers in base64: 16 or 32 bits each, lowest byte first. */
    array({ dtype, base64 }) {
      const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
      if (dtype === "float32") return new Float32Array(bytes.buffer);
      const halves = new Uint16Array(bytes.buffer);
      return Float32Array.from(halves, (half) => {
        const sign = half & 0x8000 ? -1 : 1;
        const [exponent, fraction] = [(half >> 10) & 31, half & 1023];
        if (exponent === 0) return (sign * fraction) / 2 ** 24;
        return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
      });
    },
  };
}
