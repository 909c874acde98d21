// An index that grows while the page is open: how far indexing is, that there are new videos, and what
// it suggests to ask, which takes the server a moment.

const PERIOD = 20000, PERIOD_WHILE_BUSY = 3000; // Milliseconds.
const status = document.getElementById("status");
const indexing = document.getElementById("indexing");
const suggestions = document.getElementById("suggestions");
let waiting = suggestions?.hidden;

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

/** Shows what to ask as links, once it is known. */
function showSuggestions(sentences) {
  for (const text of suggestions?.hidden ? sentences ?? [] : []) {
    const link = Object.assign(document.createElement("a"), { className: "chip", textContent: text });
    link.href = `/?${new URLSearchParams({ q: text })}`;
    suggestions.append(link, " ");
  }
  if (sentences?.length && suggestions) suggestions.hidden = false;
  waiting = Boolean(suggestions) && sentences === null;
}

async function look() {
  const answer = document.hidden ? null : await fetch(`${document.body.dataset.root}/api/index`).catch(() => null);
  const facts = answer?.ok ? await answer.json().catch(() => null) : null;
  if (facts) {
    showProgress(facts.indexing);
    showVideos(facts.videos);
    showSuggestions(facts.suggestions);
  }
  wait();
}

const wait = () => setTimeout(look, indexing.hidden && !waiting ? PERIOD : PERIOD_WHILE_BUSY);

/** Follows the index, on a page that shows hits. */
export function startGrowing() {
  if (indexing) wait();
}
