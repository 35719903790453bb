/* Draws the figures of the lessons, each when it comes into view.
 *
 * A figure's data lies in the page, beside a picture of it. The picture stays where no script runs,
 * on paper, and until Plotly has drawn. Plotly comes from this site, once, when the first figure
 * needs it. */

globalThis.peftlab = globalThis.peftlab ?? {};

{
  const STATIC = new URL(".", document.currentScript.src);
  const SETTINGS = { displaylogo: false, responsive: true };
  const asked = new Map();

  /* A script of this site; one that is asked for twice is loaded once. */
  peftlab.script = (name) => {
    if (!asked.has(name)) {
      const load = (resolve, reject) => {
        const script = document.createElement("script");
        script.src = new URL(name, STATIC);
        script.onload = resolve;
        script.onerror = () => reject(new Error(`${name} did not come`));
        document.head.append(script);
      };
      asked.set(name, new Promise(load));
    }
    return asked.get(name);
  };

  /* A figure with a width of its own is made smaller where the page is narrower than it. */
  function fit(place, layout) {
    const room = place.parentElement.clientWidth;
    const share = layout.width && room && room < layout.width ? room / layout.width : 1;
    place.style.transform = share < 1 ? `scale(${share})` : "";
    place.style.transformOrigin = "0 0";
    place.style.marginBottom = share < 1 ? `${(share - 1) * place.offsetHeight}px` : "";
  }

  /* Draw a figure into an element, or change what it shows. */
  peftlab.draw = async (place, figure) => {
    await peftlab.script("plotly.min.js");
    const layout = { ...figure.layout };
    await Plotly.react(place, figure.data, layout, SETTINGS);
    fit(place, layout);
    place.onresize ??= new ResizeObserver(() => fit(place, layout)).observe(place.parentElement);
  };

  async function live(element) {
    const place = document.createElement("div");
    const { data, layout } = JSON.parse(element.querySelector("script").textContent);
    element.append(place);
    await peftlab.draw(place, { data, layout });
    element.querySelector("img")?.remove();
    element.dataset.drawn = "";
  }

  const near = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) {
          near.unobserve(target);
          live(target);
        }
      }
    },
    { rootMargin: "400px" },
  );
  for (const element of document.querySelectorAll(".peftlab-figure")) near.observe(element);
}
