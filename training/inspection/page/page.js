"use strict";
// Unpack the plotting library, build the sections, draw; draw again where light turns to dark or the page is printed.

const recoloured = []; // what must be built again, not only drawn, where colours change

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function main() {
  document.head.append(element("script", {}, await unpacked("library")));
  document.getElementById("contents").append(element("a", { href: "#verdict" }, "Verdict"));
  facts();
  loads();
  figuresOfAll();
  comparison();
  oneRouter();
  acrossLayers();
  heads();
  exits();
  earnings();
  await drawAll();
  const redraw = () => Promise.all([...recoloured.map((build) => build()), drawAll()]);
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", redraw);
  document.documentElement.dataset.ready = "yes";
}

main().catch((error) => {
  document.querySelector("main").append(element("p", { class: "failure" }, `This browser can't draw the pictures: ${error}`));
  throw error;
});
