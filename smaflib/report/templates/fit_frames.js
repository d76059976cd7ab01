// A frame with the explorer gets the height that explorer_page.js reports.
window.addEventListener("message", (event) => {
  const height = Number(event.data && event.data.smafHeight);
  const frame = [...document.querySelectorAll("iframe")].find((each) => each.contentWindow === event.source);
  if (frame && height > 0) frame.style.height = `${height + 4}px`;
});
