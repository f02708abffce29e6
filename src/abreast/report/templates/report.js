"use strict";
// No eval: `ast` makes Vega interpret its expressions, so that the page's policy can forbid it.
const options = { renderer: "svg", actions: false, ast: true, defaultStyle: false };
options.tooltip = { disableDefaultStyle: true };
const specs = JSON.parse(document.getElementById("specs").textContent);
const drawn = Object.entries(specs).map(([name, spec]) =>
  vegaEmbed(`#chart-${name}`, spec, options),
);
Promise.all(drawn).then(() => {
  document.documentElement.dataset.charts = "drawn";
});

// Paper cannot unfold anything.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => {
  for (const each of folded) each.open = false;
});
