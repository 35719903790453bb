/* Panels that compute in the page: each element names its panel and the state that it begins with.
 *
 * A panel is a function of its data that returns `controls`, `allowed`, `text` and `figure`, each
 * a function of the state. What is common to all of them, the widgets, is here. */

peftlab.panels = peftlab.panels ?? {};

{
  const made = new Map();

  /* A panel's functions, with its data loaded; once a page. */
  peftlab.panel = (name) => {
    const load = async () => {
      await peftlab.script("panels/numbers.js");
      await Promise.all([`panels/${name}.js`, `panels/${name}_data.js`].map(peftlab.script));
      return peftlab.panels[name](peftlab.data[name]);
    };
    if (!made.has(name)) made.set(name, load());
    return made.get(name);
  };

  const element = (tag, attributes = {}, ...inside) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...inside);
    return made;
  };

  const named = (control, ...inside) =>
    element("label", {}, element("span", { textContent: control.label }), ...inside);

  /* A control as an element, and what brings it to a value. */
  const WIDGETS = {
    choose(control, put) {
      const options = control.choose.map((word) => new Option(word, word));
      const box = element("select", { onchange: () => put(box.value) }, ...options);
      return [named(control, box), (value) => (box.value = value)];
    },
    slide(control, put) {
      const told = element("output");
      const box = element("input", {
        type: "range",
        min: 0,
        max: control.slide.length - 1,
        disabled: control.still ?? false,
        oninput: () => put(control.slide[box.valueAsNumber]),
      });
      const bring = (value) => {
        box.value = control.slide.indexOf(value);
        box.setAttribute("aria-valuetext", value);
        told.textContent = value.toLocaleString("en-US");
      };
      return [named(control, box, told), bring];
    },
    switch(control, put) {
      const box = element("input", { type: "checkbox", onchange: () => put(box.checked) });
      return [named(control, box), (value) => (box.checked = value)];
    },
    tick(control, put) {
      const boxes = control.tick.map((value) => element("input", { type: "checkbox", value }));
      const ticked = () => boxes.filter((box) => box.checked).map((box) => box.value);
      for (const box of boxes) box.onchange = () => put(ticked());
      const labels = boxes.map((box) => element("label", {}, box, box.value));
      const legend = element("legend", { textContent: control.label });
      const bring = (value) => boxes.forEach((box) => (box.checked = value.includes(box.value)));
      return [element("fieldset", {}, legend, ...labels), bring];
    },
  };

  async function build(place) {
    const panel = await peftlab.panel(place.dataset.panel);
    let state = panel.allowed(JSON.parse(place.dataset.state));
    const widgets = element("div", { className: "peftlab-controls" });
    const answer = element("p", { className: "peftlab-answer" });
    answer.setAttribute("aria-live", "polite");
    const drawing = element("div", { role: "figure" });

    /* A control that offers the same as before stays: a slider can be dragged on. */
    let shown = [];
    async function show() {
      shown = panel.controls(state).map((control) => {
        const offers = JSON.stringify(control);
        const before = shown.find((other) => other.offers === offers);
        if (before) return before;
        const kind = Object.keys(WIDGETS).find((key) => key in control);
        const put = (value) => {
          state = panel.allowed({ ...state, [control.name]: value }, state);
          return show();
        };
        const [node, bring] = WIDGETS[kind](control, put);
        node.dataset.control = control.name;
        return { offers, node, bring, name: control.name };
      });
      shown.forEach(({ node }, i) => {
        if (widgets.children[i] !== node) widgets.insertBefore(node, widgets.children[i] ?? null);
      });
      while (widgets.children.length > shown.length) widgets.lastChild.remove();
      for (const { name, bring } of shown) bring(state[name]);
      const { data, layout } = panel.figure(state);
      answer.textContent = panel.text(state);
      drawing.setAttribute("aria-label", answer.textContent);
      // The answer stands above in place of the title, which a narrow page would cut.
      const margin = { ...layout.margin, t: 20 };
      await peftlab.draw(drawing, { data, layout: { ...layout, title: undefined, margin } });
    }

    place.replaceChildren(widgets, answer, element("div", {}, drawing));
    await show();
    place.dataset.drawn = "";
  }

  for (const place of document.querySelectorAll(".peftlab-panel")) build(place);
}
