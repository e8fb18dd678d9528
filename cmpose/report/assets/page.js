// A click on a tile opens the clip that starts with what it shows, else the picture itself, large.
function tiles(clips, explorer) {
  const part = (name) => document.getElementById(`large${name}`);
  const dialog = part(""), link = part("-clip");
  for (const button of document.querySelectorAll(".tile button")) {
    const { clip, large } = button.dataset;
    button.addEventListener("click", () => {
      if (large === undefined) { explorer.open(Number(clip)); return; }
      const picture = button.querySelector("img");
      part("-heading").textContent = button.querySelector("b").textContent;
      part("-detail").textContent = button.querySelector("span").textContent;
      part("-picture").src = large || picture.src;
      part("-picture").alt = picture.alt;
      link.hidden = clip === undefined;
      if (clip !== undefined) {
        const { frames, start } = clips[clip];
        link.textContent = `What was read in ${frames[start].label}`;
        link.value = clip;
      }
      dialog.showModal();
    });
  }
  link.addEventListener("click", () => { dialog.close(); explorer.open(Number(link.value)); });
  part("-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}

{
  const data = JSON.parse(document.getElementById("data").textContent);
  document.querySelectorAll(".chart").forEach((figure, i) => chart(figure, data.charts[i]));
  const root = document.getElementById("explorer");
  const explorer = root && explore(root, data.clips);
  const choice = document.getElementById("source");
  const show = () => {
    for (const part of document.querySelectorAll("[data-source]")) part.hidden = part.dataset.source !== choice.value;
    if (explorer) explorer.show(Number(choice.value));
  };
  if (choice) { choice.addEventListener("change", show); show(); } else if (explorer) explorer.show(-1);
  tiles(data.clips, explorer);
}
