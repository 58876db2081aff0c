"use strict";
// All routers beside each other: facts, load, figures.

function facts() {
  const { model, data } = stats;
  const step = model.step === null ? "" : `, step ${count(model.step)}`;
  document.getElementById("facts").textContent =
    `${model.path}${step}: ${model.depth} layers of width ${model.width}, ${count(model.parameters)} parameters, ` +
    `${count(model.active_parameters)} active per token. Looked at with ${count(data.tokens)} tokens ` +
    `(${count(data.sequences)} sequences of at most ${data.max_length}) of ${data.files.join(", ")}.`;
}

function loads() {
  const figures = routings().map((routes) => {
    const routers = stats.routers.filter((router) => router.routes === routes);
    const widest = Math.max(...routers.map((router) => router.choices));
    const fill = (values, filler) => [...values, ...Array(widest - values.length).fill(filler)];
    return heatMap(
      `Load of ${routes}, over the fair share: 1 is even (at most 3 is shown).`,
      routers.map((router) => fill(router.load.map((share) => share * router.choices), null)),
      {
        rows: routers.map((router) => router.name),
        columns: range(widest),
        across: "choice",
        down: "router",
        scale: ({ low, middle, high }) => [[0, low], [1 / 3, middle], [1, high]],
        least: 0,
        most: 3,
        unit: "load / fair share",
        text: routers.map((router) => fill(router.load.map((share) => percent(share)), "–")),
      },
    );
  });
  section("load", "Load", element("div", { class: "grid" }, ...figures));
}

function figuresOfAll() {
  const ill = (router, kind) => stats.verdict.findings.some((finding) => finding.router === router.name && finding.kind === kind);
  const marked = (router, text, ...kinds) => ({ text, sick: kinds.some((kind) => ill(router, kind)) });
  const pairs = (router) => router.identical.map(([one, other]) => `${one}=${other}`).join(" ");
  const rows = stats.routers.map((router) => [
    router.name,
    router.top_k.toFixed(router.top_k % 1 ? 1 : 0) + ` of ${router.choices}`,
    marked(router, router.alike ? "–" : number(router.max_over_mean), "collapsed", "unbalanced"),
    router.alike ? "–" : number(router.max_violation),
    router.alike ? "–" : number(router.coefficient_of_variation),
    `${number(router.entropy)} of ${number(Math.log(router.choices))}`,
    percent(router.confidence),
    percent(router.margin),
    marked(router, percent(router.dropped_fraction), "dropping"),
    marked(router, router.dead.length ? router.dead.join(" ") : "none", "dead"),
    marked(router, pairs(router) || "none", "identical"),
    percent(router.known_by_token, 0),
    marked(router, percent(router.known_by_position, 0), "position_only"),
  ]);
  section(
    "figures",
    "Routers",
    element(
      "p",
      { class: "quiet" },
      "max/mean: load of the fullest choice over the fair share; MaxVio is that less 1; CV: the load's coefficient of " +
        "variation. Entropy in nats of a token's probabilities, and its maximum. Confidence: a token's highest " +
        "probability; margin: how far the next one is. Known by token and position: how much of the best choice these " +
        "alone explain. A dash: balance isn't to be expected of this router, or there is nothing to tell.",
    ),
    table(
      ["router", "takes", "max/mean", "MaxVio", "CV", "entropy", "confidence", "margin", "dropped", "dead", "identical", "by token", "by position"],
      rows,
    ),
  );
}
