/* Says what the controls of a panel are to those who hear the page. ipywidgets gives a slider no
 * name and says the place of its value ("3") in place of the value ("8"); its film buttons have
 * pictures alone, and a button that stays down does not say so. */

function set(element, name, value) {
  if (element && element.getAttribute(name) !== value) element.setAttribute(name, value);
}

const said = (control, part) => control.querySelector(part)?.textContent.trim() ?? "";

function sayControls(panel) {
  set(panel, "role", "group");
  for (const label of panel.querySelectorAll("[title=null]")) label.removeAttribute("title");
  for (const slider of panel.querySelectorAll(".widget-slider")) {
    const [name, value] = [said(slider, ".widget-label"), said(slider, ".widget-readout")];
    const handle = slider.querySelector("[role=slider]");
    set(handle, "aria-label", name);
    set(handle, "aria-valuetext", value);
    const typed = slider.querySelector(".widget-readout");
    set(typed, "role", "textbox");
    set(typed, "aria-label", `${name}, typed`);
  }
  for (const film of panel.querySelectorAll(".widget-play")) {
    const [play, stop, repeat] = film.querySelectorAll("button");
    set(play, "aria-label", play.querySelector(".fa-pause") ? "pause" : "play");
    set(stop, "aria-label", "back to the first picture");
    set(repeat, "aria-label", "again and again");
    set(repeat, "aria-pressed", String(repeat.classList.contains("mod-active")));
  }
  for (const group of panel.querySelectorAll(".widget-toggle-buttons")) {
    set(group, "role", "group");
    set(group, "aria-label", said(group, ".widget-label"));
  }
  for (const button of panel.querySelectorAll(".widget-toggle-button")) {
    set(button, "aria-pressed", String(button.classList.contains("mod-active")));
  }
  for (const progress of panel.querySelectorAll(".widget-hprogress .progress")) {
    set(progress, "role", "progressbar");
    set(progress, "aria-label", "progress");
    set(progress, "aria-valuenow", String(parseInt(progress.firstChild.style.width) || 0));
  }
  /* What a move answers is said when it changes; a table or code would be said for minutes. */
  for (const answer of panel.querySelectorAll(".widget-html-content")) {
    set(answer, "aria-live", answer.querySelector("table, pre") ? "off" : "polite");
  }
}

/* Keeps it so: ipywidgets writes its own words at every move. Returns what ends it. */
function keepSaid(panel, plot) {
  const what = { subtree: true, childList: true, characterData: true };
  const names = ["class", "style", "aria-valuetext", "title"];
  const watch = new MutationObserver(() => sayControls(panel));
  const parts = new MutationObserver(follow);
  function follow() {
    watch.disconnect();
    for (const part of panel.children) {
      if (!part.contains(plot)) watch.observe(part, { ...what, attributeFilter: names });
    }
    sayControls(panel);
  }
  parts.observe(panel, { childList: true });
  follow();
  return () => [watch, parts].forEach((observer) => observer.disconnect());
}

