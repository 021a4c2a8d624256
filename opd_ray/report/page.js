// A row is shown large by the page's address alone (#row-3, see .row:target), also without this
// script. It adds the keys, and one step of "back" out of the row however many were looked at.
const shown = () => document.querySelector(".row:target");
const go = (link) => location.replace(link.getAttribute("href"));

addEventListener("keydown", (event) => {
  const kind = { ArrowLeft: ".before", ArrowRight: ".after", Escape: ".close" }[event.key];
  if (!kind || !shown() || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  go(shown().querySelector(kind));
});

addEventListener("click", (event) => {
  const row = shown();
  if (!row || event.ctrlKey || event.metaKey) return;
  const link = event.target === row ? row.querySelector(".close") : event.target.closest(".zoom a");
  if (!link) return;
  event.preventDefault();
  go(link);
});
