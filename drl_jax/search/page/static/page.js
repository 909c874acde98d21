"use strict";

const form = document.getElementById("search");
const status = document.getElementById("status");
const button = form.querySelector("button");

form.addEventListener("submit", () => {
  form.setAttribute("aria-busy", "true");
  button.disabled = true;
  status.textContent = "Searching …";
});

// A page that the browser brings back, by its back button, is not busy any more.
window.addEventListener("pageshow", () => {
  form.removeAttribute("aria-busy");
  button.disabled = false;
  const hits = document.querySelectorAll(".hit").length;
  status.textContent = hits ? `${hits} video${hits > 1 ? "s" : ""}, the most similar first` : "";
});

document.addEventListener("keydown", (event) => {
  const writing = event.target.closest("input, select, textarea");
  if (event.key === "/" && !writing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    document.getElementById("q").select();
  }
});

const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !still) {
      target.play().catch(() => {}); // the browser may forbid it; the controls are there
    } else {
      target.pause();
    }
  }
}, { threshold: 0.5 });

for (const hit of document.querySelectorAll(".hit")) {
  const video = hit.querySelector("video");
  const fail = () => {
    video.hidden = true;
    hit.querySelector(".unplayable").hidden = false;
  };
  video.addEventListener("error", fail);
  if (video.error) fail(); // before this script ran
  video.addEventListener("ended", () => {
    video.currentTime = Number(video.dataset.moment);
  });
  for (const moment of hit.querySelectorAll("button[data-time]")) {
    moment.addEventListener("click", () => {
      video.currentTime = Number(moment.dataset.time);
      video.play().catch(() => {});
    });
  }
  seen.observe(video);
}
