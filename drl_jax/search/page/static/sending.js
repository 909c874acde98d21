// Pictures and videos as queries: chosen, pasted or dropped, and sent to the server.

const input = document.getElementById("file");
const problem = document.getElementById("error");
// A page that shows an error has no status line.
const line = document.getElementById("status") ?? problem;
const before = line.textContent;
let sending = null;

const say = (text) => { if (line.textContent !== text) line.textContent = text; };

function reject(file, why) {
  input.value = "";
  say(before);
  problem.textContent = `${file.name || "The file"} is not used: ${why}`;
  problem.hidden = false;
  problem.scrollIntoView({ block: "nearest" });
}

function send(file) {
  const picture = file.type.startsWith("image/");
  const what = picture ? "picture" : "video";
  const most = Number(picture ? input.dataset.maxPicture : input.dataset.maxVideo);
  sending?.abort();
  if (file.size > most) return reject(file, `a ${what} has at most ${(most / 1e6).toLocaleString("en")} MB`);
  problem.hidden = line !== problem;
  const request = sending = new XMLHttpRequest(); // Unlike fetch, it tells how much is sent.
  request.open("POST", `${document.body.dataset.root}/api/${picture ? "pictures" : "videos"}`);
  request.setRequestHeader("Content-Type", "application/octet-stream");
  request.responseType = "json";
  say(`Sending the ${what} …`);
  request.upload.addEventListener("progress", ({ loaded, total }) => {
    // Not read out for every percent.
    const share = 10 * Math.floor(10 * loaded / total);
    if (share > 0 && share < 100) say(`Sending the ${what}: ${share} %`);
  });
  request.upload.addEventListener("load", () => say(`Reading the ${what} …`));
  const fail = () => reject(file, request.response?.error ?? `the server does not take the ${what}`);
  request.addEventListener("error", fail);
  request.addEventListener("load", () => {
    if (request.status !== 200) return fail();
    const address = new URL(location);
    for (const name of ["video", "t", "moments", "offset", "picture", "by_video", "like"]) {
      address.searchParams.delete(name);
    }
    for (const [name, value] of Object.entries(request.response)) address.searchParams.set(name, value);
    location.assign(address);
  });
  request.send(file);
}

/** Waits for a picture or a video. */
export function startSending() {
  input.parentElement.hidden = false;
  input.addEventListener("change", () => input.files.length && send(input.files[0]));
  document.addEventListener("paste", ({ clipboardData }) => {
    const file = [...(clipboardData?.files ?? [])].find(({ type }) => /^(image|video)\//.test(type));
    if (file) send(file);
  });
  document.addEventListener("dragover", (event) => {
    if ([...event.dataTransfer.types].includes("Files")) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    send(event.dataTransfer.files[0]);
  });
}
