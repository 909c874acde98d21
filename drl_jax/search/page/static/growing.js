// An index that grows while the page is open: how far indexing is, and that there are new videos.

const PERIOD = 20000, PERIOD_WHILE_INDEXING = 3000; // Milliseconds.
const status = document.getElementById("status");
const indexing = document.getElementById("indexing");

function showProgress(progress) {
  indexing.hidden = !progress;
  if (!progress) return;
  const [label, bar] = indexing.children;
  label.textContent = `Indexing: ${progress.done} of ${progress.total} files`;
  [bar.max, bar.value] = [progress.total, progress.done];
}

function showVideos(videos) {
  if (String(videos) === document.body.dataset.videos) return;
  document.body.dataset.videos = videos;
  const again = Object.assign(document.createElement("a"), { href: location.href, textContent: "search again" });
  status.replaceChildren(`The index now has ${videos} videos; `, again);
}

async function look() {
  const answer = document.hidden ? null : await fetch(`${document.body.dataset.root}/api/index`).catch(() => null);
  const facts = answer?.ok ? await answer.json().catch(() => null) : null;
  if (facts) {
    showProgress(facts.indexing);
    showVideos(facts.videos);
  }
  wait();
}

const wait = () => setTimeout(look, indexing.hidden ? PERIOD : PERIOD_WHILE_INDEXING);

/** Follows the index, on a page that shows hits. */
export function startGrowing() {
  if (indexing) wait();
}
