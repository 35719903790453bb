/* Draws a Plotly figure in the page, always whole, so that it cannot stay wrong:
 * when the view appears, at every change, and when the kernel, asked soon after the panel was last
 * touched, has a newer one.
 * Plotly itself travels once a kernel, in the model `script`, and is built once a page. */

const SETTINGS = { displaylogo: false };
const PATIENCE = 2000; // milliseconds until what did not come is asked for again

const TOUCHES = ["pointerup", "keyup"];

const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));

/* The packed script: from its own model or, where that never arrived, from the kernel. */
async function packed(model) {
  for (;;) {
    try {
      const name = model.get("script").slice("IPY_MODEL_".length);
      const bytes = (await model.widget_manager.get_model(name)).get("packed");
      if (bytes?.byteLength) return bytes;
    } catch (missing) {
      console.warn("peftlab: the script that draws did not arrive; asking again", missing);
    }
    const answer = new Promise((take) => {
      const listen = (content, buffers) => {
        if (content.answer !== "script") return;
        model.off("msg:custom", listen);
        take(buffers[0]);
      };
      model.on("msg:custom", listen);
    });
    model.send({ ask: "script" });
    const bytes = await Promise.race([answer, pause(PATIENCE)]);
    if (bytes?.byteLength) return bytes;
  }
}

async function build(model) {
  const stream = new Blob([await packed(model)]).stream();
  const unpacked = stream.pipeThrough(new DecompressionStream("gzip"));
  const module = { exports: {} };
  new Function("module", await new Response(unpacked).text())(module);
  return module.exports;
}

function library(model) {
  globalThis.peftlabPlotly ??= build(model).catch((error) => {
    globalThis.peftlabPlotly = undefined;
    throw error;
  });
  return globalThis.peftlabPlotly;
}

/* A figure with a width of its own is made smaller where the page is narrower than it. */
function fit(place, { width, height }, room) {
  const share = width && room && room < width ? room / width : 1;
  place.style.transform = share < 1 ? `scale(${share})` : "";
  place.style.transformOrigin = "0 0";
  place.style.marginBottom = share < 1 ? `${(share - 1) * height}px` : "";
}

function render({ model, el }) {
  const [place, trouble] = [document.createElement("div"), document.createElement("div")];
  place.className = "peftlab-plot";
  place.setAttribute("role", "figure");
  el.append(trouble, place);
  let [stale, busy, gone, Plotly, layout] = [true, false, false, undefined, {}];

  /* A point that names what it stands for tells the kernel so. */
  const clicked = ({ points }) => {
    const name = points[0]?.customdata;
    if (name !== undefined) model.send({ clicked: name });
  };

  /* Once the panel is in the page. */
  let hush;
  const sayAll = () => {
    const panel = el.closest(".widget-vbox");
    if (panel && !gone) hush ??= keepSaid(panel, el);
  };

  async function draw() {
    stale = true;
    if (busy) return;
    busy = true;
    try {
      Plotly ??= await library(model);
      while (stale && !gone) {
        stale = false;
        const figure = JSON.parse(model.get("figure"));
        const fresh = !place.on; // Plotly gives the element its events with the first figure
        await Plotly.react(place, figure.data, figure.layout, SETTINGS);
        if (fresh) place.on("plotly_click", clicked);
        layout = { width: figure.layout.width, height: figure.layout.height ?? 0 };
        fit(place, layout, el.clientWidth);
        place.setAttribute("aria-label", model.get("words") || "figure");
        trouble.textContent = "";
        sayAll();
      }
    } catch (error) {
      trouble.textContent = `The figure could not be drawn: ${error}`;
    } finally {
      busy = false;
    }
  }

  /* The kernel answers with the whole figure if this is not its newest. */
  let later;
  const compare = () => {
    clearTimeout(later);
    const ask = () => model.send({ ask: "figure", have: model.get("version") });
    later = setTimeout(ask, PATIENCE);
  };
  const touched = ({ target }) => {
    if (target.closest?.(".widget-vbox")?.contains(el)) compare();
  };
  const watch = new ResizeObserver(() => {
    sayAll();
    if (!Plotly || !place.clientWidth) return;
    if (layout.width) fit(place, layout, el.clientWidth);
    else Plotly.Plots.resize(place);
  });

  model.on("change:version", draw);
  for (const event of TOUCHES) document.addEventListener(event, touched);
  watch.observe(el);
  compare();
  draw();

  return () => {
    gone = true;
    clearTimeout(later);
    watch.disconnect();
    hush?.();
    model.off("change:version", draw);
    for (const event of TOUCHES) document.removeEventListener(event, touched);
    Plotly?.purge(place);
  };
}

export default { render };
