"use strict";
// Across layers: paths, agreement, heads, exits, what a choice earns.

const NAMED = 8; // choices of a layer that the flow shows by themselves; the others are one

function flowPicture(routes) {
  const flows = stats.flows.filter(({ source }) => byName[source].routes === routes);
  const nodes = [];
  const place = {};
  const node = (name, choice) => {
    const router = byName[name];
    const ranked = range(router.choices).sort((one, other) => router.first[other] - router.first[one]);
    const shown = router.choices <= NAMED || ranked.indexOf(choice) < NAMED;
    const key = `${name} ${shown ? choice : "others"}`;
    if (!(key in place)) {
      place[key] = nodes.length;
      nodes.push({ label: `${router.layer}: ${shown ? choice : "others"}`, choice: shown ? choice : -1 });
    }
    return place[key];
  };
  const between = new Map();
  for (const { source, target, share } of flows)
    share.forEach((row, one) =>
      row.forEach((part, other) => {
        const key = `${node(source, one)} ${node(target, other)}`;
        between.set(key, (between.get(key) || 0) + part);
      }),
    );
  const links = [...between].filter(([, part]) => part >= 0.002).map(([key, part]) => [...key.split(" ").map(Number), part]);
  const picture = plot(
    `From one layer's best choice to the next's: ${routes}, as layer: ${nameOf(routes)}. A band is tokens; below 0.2 % it isn't drawn.`,
    420,
    ({ line }) => ({
      traces: [
        {
          type: "sankey",
          arrangement: "fixed",
          node: { label: nodes.map(({ label }) => label), color: nodes.map(({ choice }) => (choice < 0 ? line : shade(choice))), pad: 8, thickness: 14, line: { color: line, width: 1 } },
          link: {
            source: links.map(([one]) => one),
            target: links.map(([, other]) => other),
            value: links.map(([, , part]) => 100 * part),
            color: links.map(() => "rgba(128,128,128,0.25)"),
            hovertemplate: "%{source.label} → %{target.label}: %{value:.1f} % of tokens<extra></extra>",
          },
          valuesuffix: " %",
        },
      ],
    }),
  );
  picture.lastChild.classList.add("flow");
  picture.lastChild.style.minWidth = `${5 * (flows.length + 1)}rem`; // many layers are moved under one's eyes
  return element("div", { class: "wide", tabindex: 0 }, picture);
}

function pathTable({ routes, tokens, distinct, top }) {
  const rows = top.slice(0, 12).map(({ choices, share, tokens: words }) => [
    choices.join(" → "),
    percent(share, 2),
    { text: element("span", {}, ...words.map((word) => element("span", { class: "chip" }, word))), words: true },
  ]);
  return element(
    "div",
    {},
    element("p", {}, `${count(distinct)} ways through the ${routes} of all layers are taken by ${count(tokens)} tokens; the most frequent:`),
    table(["best choices", "tokens", "most frequent tokens"], rows),
  );
}

function acrossLayers() {
  const { routers, nmi } = stats.agreement;
  const flows = routings().filter((routes) => stats.flows.some(({ source }) => byName[source].routes === routes));
  if (!flows.length && !stats.paths.length && routers.length < 2) return;
  section(
    "layers",
    "Across layers",
    ...flows.map(flowPicture),
    ...stats.paths.map(pathTable),
    routers.length > 1
      ? heatMap("Whether two routers divide tokens alike: 0 by chance, 1 the same division.", nmi, {
          rows: routers,
          columns: routers,
          across: "router",
          down: "router",
          scale: rising,
          least: 0,
          most: 1,
          unit: "NMI",
        })
      : null,
  );
}

function heads() {
  if (!stats.heads.length) return;
  const layers = stats.heads.map(({ layer }) => String(layer));
  const widest = Math.max(...stats.heads.map((layer) => layer.heads));
  const grid = (field, text) => {
    const fill = (values, filler) => [...values, ...Array(widest - values.length).fill(filler)];
    return [stats.heads.map((layer) => fill(layer[field], null)), stats.heads.map((layer) => fill(layer[field].map(text), "–"))];
  };
  const map = (caption, field, unit, most, text) => {
    const [values, texts] = grid(field, text);
    return heatMap(caption, values, { rows: layers, columns: range(widest), across: "head", down: "layer", scale: rising, least: 0, most, unit, text: texts });
  };
  const routed = stats.heads.some(({ router }) => router !== null);
  const which = routed ? "Heads that are always on stand first." : "No router chooses among them: all are always on.";
  const convolving = Math.max(...stats.heads.map((layer) => layer.convolving ?? 0));
  const last = convolving ? ` Of layers with mixed attention the last ${convolving} convolve: they look through kernels.` : "";
  section(
    "heads",
    "Heads",
    element("p", { class: "quiet" }, `On a sample of ${stats.heads[0].sequences} sequences. ${which}${last}`),
    element(
      "div",
      { class: "grid" },
      routed && map("How often a head is chosen.", "chosen", "share", 1, (share) => percent(share)),
      map("How far it looks: tokens between query and key, mean.", "distance", "tokens", undefined, (far) => far.toFixed(1)),
      map("How widely: entropy of its attention over the maximum.", "entropy", "entropy", 1, (share) => share.toFixed(2)),
    ),
  );
}

function exits() {
  if (!stats.exits) return;
  const { layers, histogram: left, by_length: byLength, accuracy, labels } = stats.exits;
  const total = Math.max(1, sum(left));
  section(
    "exits",
    "Exits",
    element("p", {}, `${number(sum(left.map((sequences, exit) => sequences * (layers[exit] + 1))) / total)} layers on average, for ${count(total)} sequences${labels.length ? ` of ${labels.join(", ")}` : ""}.`),
    element(
      "div",
      { class: "grid" },
      bars("Where sequences leave.", layers.map((layer) => `layer ${layer}`), [{ name: "sequences", values: left }], { across: "", upward: "sequences", format: ",d" }),
      lines("Layers passed, by length of the sequence.", byLength.groups, [{ name: "layers", values: byLength.mean_layers }], { across: "tokens", upward: "layers" }),
      accuracy && bars("Accuracy of those that left there.", layers.map((layer) => `layer ${layer}`), [{ name: "accuracy", values: accuracy }], { across: "", upward: "accuracy" }),
    ),
  );
}

// What the intervals say, by kind: whose lower end is above zero earns something.
function earned(switched) {
  const kinds = [...new Set(switched.map(({ routes }) => routes))];
  return kinds
    .map((kind) => {
      const all = switched.filter(({ routes }) => routes === kind).flatMap(({ layer, choices }) => choices.map((told) => ({ layer, ...told })));
      const named = (some) => some.slice(0, 6).map(({ layer, choice }) => `${layer}: ${choice}`).join(", ") + (some.length > 6 ? " and others" : "");
      const harmful = all.filter(({ high }) => high < 0).sort((first, second) => first.change - second.change);
      const nothing = all.filter(({ low, high }) => low === 0 && high === 0);
      const earning = all.filter(({ low }) => low > 0);
      return (
        `Of ${all.length} ${kind}, ${earning.length} earn something` +
        (harmful.length ? `, ${harmful.length} cost something (layer: ${nameOf(kind)} ${named(harmful)})` : "") +
        (nothing.length ? `, ${nothing.length} change nothing (${named(nothing)})` : "") +
        `; of ${all.length - earning.length - harmful.length - nothing.length} this sample can't tell.`
      );
    })
    .join(" ");
}

function earnings() {
  if (!stats.ablation) return;
  const { sequences, targets, loss, confidence, switched } = stats.ablation;
  section(
    "earnings",
    "What a choice earns",
    element(
      "p",
      { class: "quiet" },
      `Change of the loss, ${number(loss, 3)} nats per target, when a choice adds nothing; above zero it earns something. ` +
        `${count(targets)} targets in ${count(sequences)} sequences; bars are ${percent(confidence, 0)} intervals.`,
    ),
    sequences > 1 ? element("p", {}, earned(switched)) : null,
    element(
      "div",
      { class: "grid" },
      ...switched.map(({ layer, routes, choices }) =>
        plot(`Layer ${layer}, ${routes}.`, 230, ({ series }) => ({
          traces: [
            {
              type: "scatter",
              mode: "markers",
              x: choices.map(({ choice }) => String(choice)),
              y: choices.map(({ change }) => change),
              error_y: { type: "data", symmetric: false, array: choices.map(({ change, high }) => high - change), arrayminus: choices.map(({ change, low }) => change - low) },
              marker: { color: series, size: 7 },
              hovertemplate: "%{x}: %{y:.4f} nats<extra></extra>",
            },
          ],
          layout: { xaxis: { title: { text: nameOf(routes) }, type: "category" }, yaxis: { title: { text: "nats" }, zeroline: true } },
        })),
      ),
    ),
  );
}
