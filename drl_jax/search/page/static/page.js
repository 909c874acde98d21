"use strict";

const form = document.getElementById("search");
const status = document.getElementById("status");
const button = form.querySelector("button");

form.addEventListener("submit", () => {
  form.setAttribute("aria-busy", "true");
  button.disabled = true;
  status.textContent = "Searching …";
});

// Also runs when the back button restores the page, which must not look busy then.
window.addEventListener("pageshow", () => {
  form.removeAttribute("aria-busy");
  button.disabled = false;
  const hits = document.querySelectorAll(".hit").length;
  status.textContent = hits ? `${hits} video${hits > 1 ? "s" : ""}, most similar first` : "";
});

document.addEventListener("keydown", (event) => {
  const editing = event.target.closest("input, select, textarea");
  if (event.key === "/" && !editing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    document.getElementById("q").select();
  }
});

const reducedMotion = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const visible = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !reducedMotion) {
      target.play().catch(() => {}); // Autoplay may be blocked; the controls remain.
    } else {
      target.pause();
    }
  }
}, { threshold: 0.5 });

for (const hit of document.querySelectorAll(".hit")) {
  const video = hit.querySelector("video");
  const showUnplayable = () => {
    video.hidden = true;
    hit.querySelector(".unplayable").hidden = false;
  };
  video.addEventListener("error", showUnplayable);
  if (video.error) showUnplayable(); // The error came before this script ran.
  video.addEventListener("ended", () => {
    video.currentTime = Number(video.dataset.moment);
  });
  for (const moment of hit.querySelectorAll("button[data-time]")) {
    moment.addEventListener("click", () => {
      video.currentTime = Number(moment.dataset.time);
      video.play().catch(() => {});
    });
  }
  visible.observe(video);
}
