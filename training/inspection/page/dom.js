"use strict";
// What the sections are made of. Text of the data only ever becomes text nodes.

const stats = JSON.parse(document.getElementById("stats").textContent);
const byName = Object.fromEntries(stats.routers.map((router) => [router.name, router]));

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function section(id, title, ...children) {
  const made = element("section", { id }, element("h2", {}, title), ...children);
  document.querySelector("main").append(made);
  document.getElementById("contents").append(element("a", { href: `#${id}` }, title));
  return made;
}

// rows: arrays of what a cell holds; a cell {text, sick, words} may be marked ill, or hold words rather than a number,
// as all of its column then do.
function table(headings, rows) {
  const cell = (content) =>
    content !== null && typeof content === "object" && !(content instanceof Node)
      ? element("td", { class: [content.sick ? "sick" : "", content.words ? "text" : ""].join(" ").trim() }, content.text)
      : element("td", {}, content);
  return element(
    "div",
    { class: "wide", tabindex: 0 },
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, ...headings.map((heading, column) => element("th", { scope: "col", class: rows[0]?.[column]?.words ? "text" : "" }, heading)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell)))),
    ),
  );
}

function control(text, input) {
  input.id = input.id || `control-${document.querySelectorAll(".control").length}-${text.length}`;
  return element("div", { class: "control" }, element("label", { for: input.id }, text), input);
}

function chooser(id, options, onchoice) {
  const select = element("select", { id }, ...options.map((option) => element("option", { value: option }, option)));
  select.addEventListener("change", () => onchoice(select.value));
  return select;
}

const percent = (share, digits = 1) => (share === null ? "–" : `${(100 * share).toFixed(digits)} %`);
const number = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));
const count = (value) => value.toLocaleString("en-US");
const sum = (values) => values.reduce((total, value) => total + value, 0);
const range = (length) => Array.from({ length }, (_, index) => index);
const routings = () => [...new Set(stats.routers.map((router) => router.routes))];

// A choice's colour: hues a golden angle apart, so that neighbours differ; the number beside it says it as well.
function shade(choice) {
  if (choice < 0) return "transparent";
  const dark = matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches;
  const hue = (choice * 137.508) % 360;
  return dark ? `hsl(${hue} 45% ${26 + 8 * (choice % 2)}%)` : `hsl(${hue} 75% ${86 - 7 * (choice % 2)}%)`;
}

const tooltip = document.getElementById("tooltip");

function explained(target, text) {
  const show = () => {
    tooltip.textContent = text();
    tooltip.hidden = false;
    const at = target.getBoundingClientRect();
    const left = Math.min(at.left, document.documentElement.clientWidth - tooltip.offsetWidth - 8);
    const below = at.bottom + tooltip.offsetHeight + 8 < innerHeight;
    tooltip.style.left = `${Math.max(4, left)}px`;
    tooltip.style.top = `${below ? at.bottom + 4 : at.top - tooltip.offsetHeight - 4}px`;
  };
  const hide = () => (tooltip.hidden = true);
  target.addEventListener("mouseenter", show);
  target.addEventListener("focus", show);
  target.addEventListener("mouseleave", hide);
  target.addEventListener("blur", hide);
  return target;
}
