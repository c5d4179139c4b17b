// Run in every page: what a reader would find broken.
() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const prose = all("main p, main li, main td, main figcaption").map((element) => {
    const copy = element.cloneNode(true);
    copy.querySelectorAll("annotation, code").forEach((part) => part.remove());
    return copy.textContent;
  });
  const raw = /`|\$\$|\\frac|\\text|:::|\{#|\{\.|\{\{<|\]\(|@(fig|eq|tbl|sec)-/;
  const ids = all("[id]").map((element) => element.id);

  // contrast of text with what lies behind it
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const faint = new Set();
  for (const element of all("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length || element.closest("math, .copy")) continue;
    const [a, b] = [light(rgb(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.add(`${element.tagName.toLowerCase()}.${element.className}: ${element.textContent.trim().slice(0, 30)}`);
  }

  return {
    problems: {
      "headings of the first level other than one": all("h1").length === 1 ? [] : [all("h1").length],
      "broken picture": [...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src),
      "picture without alternative text": all("main img").filter((image) => !image.alt).map((image) => image.src),
      "formula that does not show": all("math").filter((math) => !math.getBoundingClientRect().width).map((math) => math.textContent),
      "raw markup in the text": prose.filter((text) => raw.test(text)).map((text) => text.slice(0, 120)),
      "cell directive in the code": all("main pre").filter((pre) => /^#\|/m.test(pre.textContent)).map((pre) => pre.textContent.slice(0, 60)),
      "anchor twice": ids.filter((id, i) => ids.indexOf(id) !== i),
      "text too faint": [...faint].slice(0, 5),
      "empty link": all("a[href]").filter((a) => !a.textContent.trim() && !a.getAttribute("aria-label") && !a.querySelector("img") && !a.closest("code")).map((a) => a.outerHTML),
      "wider than the window": document.documentElement.scrollWidth > innerWidth + 1 ? [document.documentElement.scrollWidth] : [],
    },
    ids,
    links: all("a[href]").map((a) => a.href),
  };
}
