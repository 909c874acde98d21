// The viewer: a dialog with the player, its timeline, and the moments of one video. What it shows is
// part of the address, so that back, reload and a shared link work.

const dialog = document.getElementById("viewer");
const content = document.getElementById("viewer-content");
const said = document.getElementById("said");
const still = window.matchMedia("(prefers-reduced-motion: reduce)");
const SEEK = 5; // Seconds.
const OPENED = ["video", "t", "moments"]; // What an address says of the open video.
let facts = null; // Answer of the API about the open video.
let loads = 0;

const find = (selector) => content.querySelector(selector);
const player = () => find("video");
const opened = () => find(".viewer")?.dataset;
const tiles = () => [...document.querySelectorAll("#hits .tile a[data-video]")];
const place = () => tiles().findIndex((link) => link.dataset.video === opened()?.video);

function say(text) {
  said.textContent = "";
  requestAnimationFrame(() => { said.textContent = text; }); // Also if it is the same again.
}

// ---------------------------------------------------------------------- opening and closing

/** Opens a hit by its address; the back button closes it. */
export async function openFrom(address) {
  if (await load(address)) history.pushState({ opened: true }, "", address);
}

/** The viewer of an address as HTML; null if there is none, which is said, or another was opened. */
async function fetchViewer(address) {
  const mine = ++loads;
  const answer = await fetch(`${document.body.dataset.root}/viewer${new URL(address, location).search}`).catch(() => null);
  const text = answer ? await answer.text() : "the server does not answer";
  if (mine !== loads) return null; // Another one was asked for meanwhile.
  if (answer?.ok) return text;
  const status = dialog.open ? said : document.getElementById("status");
  if (status) status.textContent = text;
  return null;
}

async function load(address) {
  const text = await fetchViewer(address);
  if (text === null) return false;
  player()?.removeAttribute("src"); // Ends the download.
  content.innerHTML = text;
  show();
  return true;
}

/** Shows more moments of the open video, which plays on. */
async function loadMoments(link) {
  const text = await fetchViewer(link.href);
  if (text === null) return;
  const video = player(), wasPlaying = video && !video.paused;
  const before = find(".more-moments").querySelectorAll("li").length;
  const unplayable = find(".unplayable").hidden;
  content.innerHTML = text;
  if (video) player()?.replaceWith(video);
  find(".unplayable").hidden = unplayable;
  history.replaceState(history.state, "", link.href);
  prepare();
  setPosition(video && !video.dataset.converted ? video.currentTime : Number(opened().time));
  if (wasPlaying) video.play().catch(() => {});
  find(".more-moments").querySelectorAll("li a")[before]?.focus();
}

function show() {
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  prepare();
  find("#viewer-title").focus();
  startPlayer();
  setPosition(Number(opened().time));
}

function prepare() {
  said.textContent = "";
  facts = null;
  const at = place();
  for (const [name, other] of [["previous", at - 1], ["next", at + 1]]) {
    const button = find(`[data-do="${name}"]`);
    button.hidden = tiles().length < 2;
    button.disabled = !tiles()[other];
  }
  find('[data-do="copy"]').hidden = false;
}

function close() {
  const link = tiles()[place()];
  player()?.removeAttribute("src");
  content.replaceChildren();
  if (dialog.returnValue === "search") document.getElementById("q").select();
  else link?.focus({ preventScroll: true });
  dialog.returnValue = "";
  const address = new URL(location);
  if (!address.searchParams.has("video")) return;
  if (history.state?.opened) return history.back();
  for (const name of OPENED) address.searchParams.delete(name);
  history.pushState(null, "", address);
}

/** Which hits an address shows. */
function search(address) {
  const parameters = new URL(address).searchParams;
  for (const name of OPENED) parameters.delete(name);
  return parameters.toString();
}

const searched = search(location);

window.addEventListener("popstate", () => {
  if (search(location) !== searched) return location.reload();
  if (new URL(location).searchParams.has("video")) return load(location.href);
  if (dialog.open) dialog.close();
});

async function step(by) {
  const link = tiles()[place() + by];
  if (link && await load(link.href)) history.replaceState(history.state, "", link.href);
}

// ---------------------------------------------------------------------- the player

function startPlayer() {
  const video = player();
  if (!video) return;
  const showFrames = () => {
    if (player() !== video) return; // It was closed, which is an error, too.
    video.hidden = true;
    find(".unplayable").hidden = false;
  };
  video.addEventListener("error", showFrames);
  if (video.error) showFrames(); // The error came before this script ran.
  for (const event of ["timeupdate", "seeking"]) {
    video.addEventListener(event, () => {
      if (player() === video) setPosition(video.currentTime); // It may be closed by then.
    });
  }
  stopAtEnd(video);
  if (!still.matches) video.play().catch(() => {}); // May be blocked; the controls remain.
}

/** Pauses once where the moment ends, unless somebody has gone on from there before. */
function stopAtEnd(video) {
  let end = Number(opened().end ?? Infinity);
  const check = () => {
    if (video.currentTime < end) return true;
    if (!video.seeking) video.pause();
    end = Infinity;
    return false;
  };
  const watch = () => {
    if (player() === video && !video.paused && check()) requestAnimationFrame(watch);
  };
  video.addEventListener("play", watch);
  video.addEventListener("seeking", check);
  video.addEventListener("timeupdate", check); // In a tab that is hidden.
}

const clock = (seconds) => {
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
};

function setPosition(time) {
  const duration = Number(opened().duration);
  const slider = find(".slider");
  find(".playhead").style.left = `${100 * Math.min(1, time / duration)}%`;
  slider.setAttribute("aria-valuenow", time.toFixed(1));
  slider.setAttribute("aria-valuetext", clock(time));
}

function seek(time, andPlay = false) {
  const video = player();
  if (!video || video.hidden || video.dataset.converted) return;
  video.currentTime = Math.max(0, Math.min(time, Number(opened().duration)));
  if (andPlay) video.play().catch(() => {});
}

function toggle() {
  const video = player();
  if (!video || video.hidden) return;
  if (video.paused) video.play().catch(() => {});
  else video.pause();
}

/** Plays the moment as a file that the server makes. */
function convert(button) {
  const video = player();
  button.disabled = true;
  say("Converting …");
  const fail = async () => {
    const answer = await fetch(button.dataset.clip).catch(() => null);
    say(answer && !answer.ok ? await answer.text() : "This browser cannot play the clip either.");
  };
  const clip = video.cloneNode();
  clip.src = button.dataset.clip;
  clip.hidden = false;
  clip.dataset.converted = "true";
  clip.addEventListener("error", () => {
    if (player() !== clip) return;
    clip.replaceWith(video);
    fail();
  });
  clip.addEventListener("loadeddata", () => {
    if (player() !== clip) return;
    find(".unplayable").hidden = true;
    say("");
  });
  video.replaceWith(clip);
  clip.play().catch(() => {});
}

// ---------------------------------------------------------------------- the timeline

function timeAt(event) {
  const box = find(".timeline").getBoundingClientRect();
  const share = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
  return { share, time: share * Number(opened().duration) };
}

async function hover(event) {
  const { share, time } = timeAt(event);
  const box = find(".hover");
  box.style.left = `${100 * share}%`;
  box.lastElementChild.textContent = clock(time);
  box.hidden = false;
  if (facts === null) {
    facts = {}; // Asked for.
    const answer = await fetch(`${document.body.dataset.root}/api/video${location.search}`).catch(() => null);
    if (answer?.ok && facts !== null) facts = await answer.json();
  }
  if (!facts?.frames || facts.path !== opened()?.video) return;
  // The last frame that is shown by then.
  let number = 0;
  while (number + 1 < facts.frames.length && facts.frames[number + 1] <= time) number++;
  const address = facts.frame_prefix + number;
  const image = box.firstElementChild;
  if (image.getAttribute("src") !== address) image.src = address;
}

content.addEventListener("pointermove", (event) => {
  if (event.target.closest(".timeline")) hover(event);
  else if (find(".hover")) find(".hover").hidden = true;
});

// ---------------------------------------------------------------------- links and keys

function linkHere() {
  const address = new URL(location);
  const video = player();
  if (video && !video.hidden && !video.dataset.converted) {
    address.searchParams.set("t", video.currentTime.toFixed(1));
  }
  return address.href;
}

async function copy() {
  const link = linkHere();
  try {
    await navigator.clipboard.writeText(link);
    say("Link copied.");
  } catch {
    say(`Copy this link: ${link}`); // Browsers give the clipboard to https and this machine only.
  }
}

/** Downloads a file, or returns why not; a plain link would save the message of an error. */
export async function download(address, name) {
  const answer = await fetch(address).catch(() => null);
  if (!answer) return "the server does not answer";
  const isJSON = answer.headers.get("Content-Type") === "application/json";
  if (!answer.ok) return isJSON ? (await answer.json()).error : answer.text();
  const file = URL.createObjectURL(await answer.blob());
  Object.assign(document.createElement("a"), { href: file, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(file), 60000);
  return null;
}

async function save(link) {
  say("Making the clip …");
  say(await download(link.href, link.download) ?? "Clip saved.");
}

const ACTIONS = {
  previous: () => step(-1),
  next: () => step(1),
  copy,
  save,
  close: () => dialog.close(),
  convert,
  more: loadMoments,
};

content.addEventListener("click", async (event) => {
  const { target } = event;
  if (event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const acting = target.closest("[data-do]");
  const moment = target.closest(".more-moments li a");
  const frame = target.closest("[data-seek]");
  if (acting || moment) event.preventDefault();
  if (acting) ACTIONS[acting.dataset.do](acting);
  else if (frame) seek(Number(frame.dataset.seek), true);
  else if (target.closest(".slider")) seek(timeAt(event).time);
  else if (moment && await load(moment.href)) history.replaceState(history.state, "", moment.href);
});

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.closest("input, select, textarea")) return;
  const act = dialog.open ? viewerKey(key, target) : null;
  if (act) {
    event.preventDefault();
    act();
  } else if (key === "/") {
    event.preventDefault();
    if (dialog.open) dialog.close("search");
    else document.getElementById("q").select();
  }
}, true);

function viewerKey(key, target) {
  const inPlayer = target.closest("video, .slider");
  const direction = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (direction && target.closest(".scroll")) return null; // It scrolls the table.
  if (direction && inPlayer) return () => seek((player()?.currentTime ?? 0) + SEEK * direction);
  if (direction) return () => step(direction);
  if (key === "Home" && target.closest(".slider")) return () => seek(0);
  if (key === "End" && target.closest(".slider")) return () => seek(Number(opened().duration));
  if (key === " " && !target.closest("button, a, summary")) return toggle;
  if (key === "m") return copy;
  if (key === "e" && find('[data-do="save"]')) return () => find('[data-do="save"]').click();
  return null;
}

/** Shows the hit that the address names, and waits for the others. */
export function startViewer() {
  dialog.addEventListener("close", close);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // The backdrop.
  });
  if (!dialog.open) return;
  dialog.removeAttribute("open"); // It is not modal yet.
  show();
}
