{
  const data = JSON.parse(document.getElementById("data").textContent);
  document.querySelectorAll(".chart").forEach((figure, i) => chart(figure, data.charts[i]));
  const explorer = document.getElementById("explorer");
  if (explorer) explore(explorer, data.clips);
}
