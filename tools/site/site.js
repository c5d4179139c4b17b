// Search, the chapter menu of narrow windows, and copy buttons.
const field = document.getElementById("search");
const hits = document.getElementById("hits");
let index;

// Every word must occur; a hit in the title counts most, then the heading, then the text.
function score(entry, words) {
  const [title, heading, text] = [entry.title, entry.heading, entry.text].map((part) => part.toLowerCase());
  let sum = 0;
  for (const word of words) {
    const points = 8 * title.includes(word) + 4 * heading.includes(word) + text.includes(word);
    if (!points) return 0;
    sum += points;
  }
  return sum;
}

function excerpt(text, word) {
  const at = Math.max(0, text.toLowerCase().indexOf(word) - 40);
  return (at ? "…" : "") + text.slice(at, at + 120);
}

function hitLine(entry, words) {
  const line = document.createElement("li");
  const link = line.appendChild(document.createElement("a"));
  link.href = field.dataset.root + entry.href;
  link.appendChild(document.createElement("strong")).textContent =
    entry.heading ? `${entry.title} › ${entry.heading}` : entry.title;
  link.appendChild(document.createElement("span")).textContent = excerpt(entry.text, words[0]);
  return line;
}

async function find() {
  const words = field.value.toLowerCase().trim().split(/\s+/).filter(Boolean);
  index ??= await (await fetch(field.dataset.root + "search.json")).json();
  const found = index.map((entry) => [score(entry, words), entry]).filter(([points]) => points);
  found.sort(([a], [b]) => b - a);
  hits.replaceChildren(...found.slice(0, 10).map(([, entry]) => hitLine(entry, words)));
  if (words.length && !found.length) hits.innerHTML = "<li class='none'>Nothing found</li>";
  hits.hidden = !words.length;
}

field.addEventListener("input", find);
field.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { field.value = ""; hits.hidden = true; }
  if (event.key === "Enter") hits.querySelector("a")?.click();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(event.target.tagName)) { event.preventDefault(); field.focus(); }
});
document.addEventListener("click", (event) => {
  if (!event.target.closest(".finder")) hits.hidden = true;
});

const menu = document.getElementById("menu");
menu.addEventListener("click", () => {
  menu.setAttribute("aria-expanded", document.body.classList.toggle("menu-open"));
});

const side = document.getElementById("quarto-sidebar");
const active = side.querySelector(".active");
if (active && active.offsetTop > side.clientHeight * 0.6) side.scrollTop = active.offsetTop - side.clientHeight / 2;

for (const block of document.querySelectorAll("pre.cell-code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.parentElement.classList.add("has-copy");
  block.parentElement.append(button);
}
