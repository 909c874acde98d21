// The search, the tiles, their selection and previews, and the queries that were asked before.
import { startGrowing } from "./growing.js";
import { startSending } from "./sending.js";
import { download, openFrom, startViewer } from "./viewer.js";

const form = document.getElementById("search");
const status = document.getElementById("status");
const hits = document.getElementById("hits");
const still = window.matchMedia("(prefers-reduced-motion: reduce)");

// ---------------------------------------------------------------------- the search

form.addEventListener("submit", () => {
  form.setAttribute("aria-busy", "true");
  form.querySelector("button").disabled = true;
  if (status) status.textContent = "Searching …";
});

// The address holds only what is asked for.
form.addEventListener("formdata", ({ formData }) => {
  for (const [name, value] of [...formData]) if (!value) formData.delete(name);
});

// Also when the back button restores the page, which must not look busy then.
const shown = status?.textContent;
window.addEventListener("pageshow", () => {
  form.removeAttribute("aria-busy");
  form.querySelector("button").disabled = false;
  if (status) status.textContent = shown;
  if (hits) countPicked();
});

// ---------------------------------------------------------------------- selected hits

const picked = document.getElementById("picked");

function countPicked() {
  const count = hits.querySelectorAll(".pick :checked").length;
  picked.hidden = !count;
  const text = `${count} video${count === 1 ? "" : "s"} selected`;
  picked.querySelector("p").textContent = count ? text : "";
}

hits?.addEventListener("change", countPicked);
picked?.addEventListener("click", async ({ target }) => {
  const { format } = target.dataset;
  if (!format) return;
  const address = new URL("/api/export", location), say = picked.querySelector("p");
  address.search = location.search; // What is asked for gives the moments their scores.
  for (const name of ["video", "t", "moments", "offset", "top"]) address.searchParams.delete(name);
  address.searchParams.set("format", format);
  for (const { dataset } of hits.querySelectorAll(".pick :checked")) {
    address.searchParams.append("moment", dataset.moment);
  }
  say.textContent = format === "zip" ? "Making the clips …" : "Making the list …";
  target.disabled = true;
  const problem = await download(address, `moments.${format}`);
  target.disabled = false;
  say.textContent = problem ?? "Exported.";
});
document.getElementById("unpick")?.addEventListener("click", () => {
  for (const box of hits.querySelectorAll(".pick :checked")) box.checked = false;
  countPicked();
  document.getElementById("q").focus();
});

// ---------------------------------------------------------------------- previews

let preview = null;

function startPreview(link) {
  stopPreview();
  if (still.matches) return;
  const picture = link.querySelector(".picture");
  preview = { link, parts: [], timer: setTimeout(() => playInto(picture, link), 150) };
}

function stopPreview() {
  if (!preview) return;
  clearInterval(preview.timer);
  for (const part of preview.parts) {
    part.removeAttribute("src"); // Ends the download.
    part.remove();
  }
  preview = null;
}

function playInto(picture, { dataset }) {
  if (dataset.state !== "ok") return cycleInto(picture, dataset);
  const [start, end] = [Number(dataset.start), Number(dataset.end)];
  const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
  const mine = preview;
  video.src = `${dataset.media}#t=${start}`;
  video.addEventListener("playing", () => video.classList.add("playing"));
  video.addEventListener("timeupdate", () => {
    if (video.currentTime >= end) video.currentTime = start;
  });
  video.addEventListener("ended", () => {
    video.currentTime = start;
    video.play().catch(() => {});
  });
  video.addEventListener("error", () => {
    if (preview === mine && video.isConnected) cycleInto(picture, dataset);
  });
  preview.parts.push(video);
  picture.append(video);
  video.play().catch(() => {});
}

function cycleInto(picture, { strip, count }) {
  if (!strip) return;
  const frame = document.createElement("span");
  frame.className = "frame";
  frame.style.setProperty("--strip", `url("${strip}")`);
  frame.style.setProperty("--count", count);
  let number = 0;
  const show = () => frame.style.setProperty("--at", count > 1 ? number++ % count / (count - 1) : 0);
  show();
  preview.parts.push(frame);
  picture.append(frame);
  preview.timer = setInterval(show, 500);
}

hits?.addEventListener("pointerover", (event) => {
  const link = event.target.closest(".tile a[data-video]");
  if (link && link !== preview?.link && event.pointerType === "mouse") startPreview(link);
});
hits?.addEventListener("pointerleave", stopPreview);
hits?.addEventListener("pointerout", (event) => {
  if (preview && !preview.link.contains(event.relatedTarget)) stopPreview();
});
hits?.addEventListener("focusin", (event) => {
  const link = event.target.closest(".tile a[data-video]");
  if (link?.matches(":focus-visible")) startPreview(link);
});
hits?.addEventListener("focusout", stopPreview);

// The place of a picture pulses until it is there.
document.addEventListener("load", ({ target }) => {
  target.closest?.(".picture")?.classList.add("loaded");
}, true);
for (const image of document.querySelectorAll(".picture img")) {
  if (image.complete && image.naturalWidth) image.parentElement.classList.add("loaded");
}

// A picture that cannot be read leaves the thumbnail under it.
document.addEventListener("error", ({ target }) => {
  if (target.matches?.("img.sharp")) target.remove();
}, true);
for (const image of document.querySelectorAll("img.sharp")) {
  if (image.complete && !image.naturalWidth && image.loading !== "lazy") image.remove();
}

// ---------------------------------------------------------------------- hits

hits?.addEventListener("click", async (event) => {
  const link = event.target.closest("a:not(.folded)");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  stopPreview();
  if (link.id === "more") await loadMore(link);
  else await openFrom(link.href);
});

async function loadMore(link) {
  link.setAttribute("aria-busy", "true");
  const answer = await fetch(`${document.body.dataset.root}/tiles${new URL(link.href).search}`).catch(() => null);
  const text = answer ? await answer.text() : "the server does not answer";
  link.removeAttribute("aria-busy");
  if (!answer?.ok) {
    status.textContent = text;
    return;
  }
  link.parentElement.remove();
  const added = document.createElement("template");
  added.innerHTML = text;
  const first = added.content.querySelector(".tile a");
  const line = hits.querySelector(".apart");
  if (line) {
    // Weak matches stay together, below the others.
    for (const tile of added.content.querySelectorAll(".tile:not(.apart ~ .tile)")) line.before(tile);
    added.content.querySelector(".apart")?.remove();
  }
  hits.append(added.content);
  first?.focus({ preventScroll: true });
}

// ---------------------------------------------------------------------- recent queries

const KEY = "drl_jax.recent", MOST = 8;

function recentQueries() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(kept) ? kept.filter((text) => typeof text === "string") : [];
  } catch {
    return []; // The browser keeps nothing, or not what this page wrote.
  }
}

function keepRecent(queries) {
  try {
    localStorage.setItem(KEY, JSON.stringify(queries.slice(0, MOST)));
  } catch { /* The browser keeps nothing. */ }
}

const asked = new URL(location).searchParams.get("q");
if (asked && hits) keepRecent([asked, ...recentQueries().filter((text) => text !== asked)]);

const recent = document.getElementById("recent");
if (recent && recentQueries().length) {
  for (const text of recentQueries()) {
    const link = Object.assign(document.createElement("a"), { className: "chip", textContent: text });
    link.href = `${document.body.dataset.root}/?${new URLSearchParams({ q: text })}`;
    recent.lastElementChild.before(link, " ");
  }
  recent.hidden = false;
  document.getElementById("forget").addEventListener("click", () => {
    keepRecent([]);
    recent.hidden = true;
    document.getElementById("q").focus();
  });
}

startSending();
startGrowing();
startViewer();
