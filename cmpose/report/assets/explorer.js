// One clip, one keypoint, one frame: heatmap, causal tokens and clusters on the crop.

const LARGE = 560; // height in pixels that crops are drawn at
const DEAD = 0.05; // a heatmap below shows nobody's joint; a right one reaches 1

function words(name) {
  return name.replaceAll("_", " ");
}

function explore(root, clips) {
  const part = (id) => document.getElementById(id);
  const state = { clip: 0, frame: 0, joint: 0 };
  const pictures = new Map(); // data URI → its decoded picture
  const frames = () => clips[state.clip].frames;
  const shown = () => frames()[state.frame];
  let round = 0; // of drawing; one that was overtaken stops

  function picture(uri) {
    if (!pictures.has(uri)) {
      const image = new Image();
      image.src = uri;
      pictures.set(uri, image.decode().then(() => image));
    }
    return pictures.get(uri);
  }

  // -- drawing ---------------------------------------------------------------------------------

  function sheet(canvas, record, crop) {
    const scale = LARGE / record.size[0];
    canvas.width = Math.round(record.size[1] * scale);
    canvas.height = LARGE;
    const g = canvas.getContext("2d");
    g.drawImage(crop, 0, 0, canvas.width, canvas.height);
    const at = ([x, y]) => [(x + 0.5) * scale, (y + 0.5) * scale]; // pixel centres
    return { g, record, crop, scale, at, width: canvas.width, height: canvas.height };
  }

  function dim(s, strength) {
    s.g.fillStyle = `rgb(12 14 18 / ${strength})`;
    s.g.fillRect(0, 0, s.width, s.height);
  }

  function skeleton(s, points, color, width) {
    const { g, record, at } = s;
    g.lineCap = "round";
    for (const rim of [true, false]) {
      record.limbs.forEach(([a, b], i) => {
        if (!points[a] || !points[b]) return;
        g.strokeStyle = rim ? "rgb(0 0 0 / .6)" : color || record.limb_colors[i];
        g.lineWidth = width + (rim ? 2 : 0);
        g.beginPath();
        g.moveTo(...at(points[a]));
        g.lineTo(...at(points[b]));
        g.stroke();
      });
    }
  }

  function dot(s) {
    const point = s.record.keypoints[state.joint];
    if (!point) return;
    const { g } = s;
    for (const [color, radius] of [["#000", 9], ["#fff", 8], [s.record.colors[state.joint], 5.5]]) {
      g.fillStyle = color;
      g.beginPath();
      g.arc(...s.at(point), radius, 0, 2 * Math.PI);
      g.fill();
    }
  }

  function poses(s) {
    if (s.record.truth && part("draw-truth").checked) skeleton(s, s.record.truth, "#fff", 2);
    if (part("draw-pose").checked) skeleton(s, s.record.keypoints, "", 3);
  }

  function paintHeatmap(s, maps) {
    const [h, w] = s.record.heatmaps.size;
    const tint = document.createElement("canvas");
    tint.width = w;
    tint.height = h;
    const g = tint.getContext("2d");
    g.drawImage(maps, 0, state.joint * h, w, h, 0, 0, w, h);
    g.globalCompositeOperation = "source-in";
    g.fillStyle = s.record.colors[state.joint];
    g.fillRect(0, 0, w, h);
    dim(s, 0.55);
    s.g.imageSmoothingEnabled = true;
    // Heatmap pixel p lies at crop pixel stride · p.
    const stride = [s.width / w, s.height / h];
    s.g.drawImage(tint, (s.scale - stride[0]) / 2, (s.scale - stride[1]) / 2, s.width, s.height);
    poses(s);
    dot(s);
  }

  function cell(s, token) {
    const [rows, columns] = s.record.tokens.grid;
    const edge = (i, count, size) => Math.round((i * size) / count);
    const row = Math.floor(token / columns), column = token % columns;
    const x = edge(column, columns, s.width), y = edge(row, rows, s.height);
    return [x, y, edge(column + 1, columns, s.width) - x, edge(row + 1, rows, s.height) - y];
  }

  function uncover(s, token) {
    const [x, y, w, h] = cell(s, token);
    const [sx, sy] = [s.crop.naturalWidth / s.width, s.crop.naturalHeight / s.height];
    s.g.drawImage(s.crop, x * sx, y * sy, w * sx, h * sy, x, y, w, h);
  }

  function frameCell(s, token, color, width) {
    const [x, y, w, h] = cell(s, token);
    s.g.lineWidth = width;
    s.g.strokeStyle = color;
    s.g.strokeRect(x + width / 2, y + width / 2, w - width, h - width);
  }

  function own(s) {
    for (const token of s.record.tokens.top[state.joint]) {
      frameCell(s, token, "#000", 6);
      frameCell(s, token, s.record.colors[state.joint], 4);
    }
  }

  function paintCausal(s) {
    dim(s, 0.66);
    for (const token of s.record.tokens.causal) uncover(s, token);
    for (const token of s.record.tokens.causal) frameCell(s, token, "rgb(255 255 255 / .45)", 1);
    poses(s);
    own(s);
    dot(s);
  }

  function paintClusters(s) {
    const { noncausal, assignment, cluster_colors: colors, centers, grid } = s.record.tokens;
    if (!assignment) {
      s.g.fillStyle = "rgb(12 14 18 / .8)";
      for (const token of noncausal) s.g.fillRect(...cell(s, token));
      own(s);
      return;
    }
    const cluster = new Map(noncausal.map((token, i) => [token, assignment[i]]));
    s.g.globalAlpha = 0.6;
    for (const [token, c] of cluster) {
      s.g.fillStyle = colors[c];
      s.g.fillRect(...cell(s, token));
    }
    s.g.globalAlpha = 1;
    const heaviest = weights(s.record)[0];
    const columns = grid[1];
    // Borders: between clusters thin, around the keypoint's heaviest one thick.
    for (const [color, width, of] of [["rgb(0 0 0 / .7)", 2, null], ["#fff", 4, heaviest && heaviest.cluster]]) {
      s.g.strokeStyle = color;
      s.g.lineWidth = width;
      s.g.beginPath();
      for (const [token, c] of cluster) {
        if (of !== null && c !== of) continue;
        const [x, y, w, h] = cell(s, token);
        const inset = of === null ? 0 : width / 2;
        const column = token % columns;
        const sides = [
          [column ? token - 1 : -1, x + inset, y, x + inset, y + h],
          [column + 1 < columns ? token + 1 : -1, x + w - inset, y, x + w - inset, y + h],
          [token - columns, x, y + inset, x + w, y + inset],
          [token + columns, x, y + h - inset, x + w, y + h - inset],
        ];
        for (const [other, x1, y1, x2, y2] of sides) {
          if (cluster.get(other) !== c) { s.g.moveTo(x1, y1); s.g.lineTo(x2, y2); }
        }
      }
      s.g.stroke();
    }
    for (const center of centers) {
      const [x, y, w, h] = cell(s, noncausal[center]);
      for (const [color, width] of [["#000", 4], ["#fff", 2]]) {
        s.g.strokeStyle = color;
        s.g.lineWidth = width;
        s.g.beginPath();
        s.g.arc(x + w / 2, y + h / 2, Math.max(3, w / 7), 0, 2 * Math.PI);
        s.g.stroke();
      }
    }
    own(s);
    dot(s);
  }

  // -- words -----------------------------------------------------------------------------------

  // Clusters by the keypoint's score in their tokens, heaviest first.
  function weights(record) {
    const { noncausal, assignment, scores } = record.tokens;
    const entries = new Map();
    assignment.forEach((cluster, i) => {
      const entry = entries.get(cluster) || { cluster, score: 0, tokens: 0 };
      entry.score += scores[state.joint][noncausal[i]];
      entry.tokens += 1;
      entries.set(cluster, entry);
    });
    return [...entries.values()].sort((a, b) => b.score - a.score);
  }

  function sentence(frame) {
    const record = frame.record, joint = state.joint;
    const name = words(record.joints[joint]);
    let said = `${name[0].toUpperCase()}${name.slice(1)}: heatmap maximum ${record.scores[joint].toFixed(2)}`;
    const truth = record.truth && record.truth[joint], point = record.keypoints[joint];
    if (truth && point) {
      const away = Math.hypot(point[0] - truth[0], point[1] - truth[1]);
      said += frame.size
        ? `, ${(away / frame.size).toFixed(2)} ${frame.unit} from the truth`
        : `, ${away.toFixed(1)} crop pixels from the truth`;
    } else if (record.truth) said += ", not annotated here";
    const tokens = record.tokens;
    if (!tokens) return `${said}.`;
    const cells = tokens.top[joint].map((token) => {
      const row = Math.floor(token / tokens.grid[1]) + 1, column = (token % tokens.grid[1]) + 1;
      return `row ${row}, column ${column} (score ${tokens.scores[joint][token].toFixed(3)})`;
    });
    said += `. Causal token${cells.length > 1 ? "s" : ""}: ${cells.join("; ")}.`;
    if (tokens.assignment) {
      const [most] = weights(record);
      said += ` Of the merged ones the white-rimmed cluster weighs most for it: score ${most.score.toFixed(3)} in ${most.tokens} token${most.tokens > 1 ? "s" : ""}.`;
    }
    return said;
  }

  function captions(record) {
    const tokens = record.tokens, name = words(record.joints[state.joint]);
    const off = "The model has no Fine Token Enhancement (model.fine=off): no token is selected.";
    const score = record.scores[state.joint];
    const heatmap = score < DEAD ? `of the ${name}: next to nothing, ${score.toFixed(2)} at most` : `of the ${name}, ${score.toFixed(2)} at most`;
    if (!tokens) return { heatmap, causal: off, clusters: off };
    const all = tokens.grid[0] * tokens.grid[1];
    return {
      heatmap,
      causal: `of the ${name}, framed; the other keypoints' in clear; ${tokens.causal.length} of ${all} in all`,
      clusters: tokens.assignment
        ? `${tokens.noncausal.length} other tokens in ${tokens.centers.length} clusters, ○ a centre, white the heaviest for the ${name}`
        : `none: this model discards the other ${tokens.noncausal.length} tokens (model.fine=causal_only)`,
    };
  }

  async function draw() {
    const mine = ++round;
    const frame = shown(), record = frame.record;
    part("frame-name").textContent = `${state.frame + 1} of ${frames().length}: ${frame.label}`;
    part("frame").setAttribute("aria-valuetext", frame.label);
    const said = captions(record);
    part("reading").textContent = `${frame.note ? `${frame.note}. ` : ""}${sentence(frame)}`;
    const [crop, maps] = await Promise.all([picture(record.crop), picture(record.heatmaps.sheet)]);
    if (mine !== round) return;
    const paint = { heatmap: (s) => paintHeatmap(s, maps), causal: paintCausal, clusters: paintClusters };
    for (const panel of root.querySelectorAll(".panel")) {
      const kind = panel.dataset.panel, canvas = panel.querySelector("canvas");
      panel.querySelector("figcaption span").textContent = said[kind];
      canvas.hidden = kind !== "heatmap" && !record.tokens;
      canvas.setAttribute("aria-label", `${frame.label}: ${kind}, ${said[kind]}`);
      if (!canvas.hidden) paint[kind](sheet(canvas, record, crop));
    }
    root.dataset.shown = `${state.clip}/${state.frame}/${state.joint}`;
  }

  // -- controls --------------------------------------------------------------------------------

  function choose(joint) {
    state.joint = joint;
    part("keypoints").querySelectorAll("button").forEach((button, j) => button.setAttribute("aria-pressed", String(j === joint)));
    draw();
  }

  function buttons() {
    const record = shown().record;
    part("keypoints").replaceChildren(...record.joints.map((name, j) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "chip";
      const swatch = document.createElement("i");
      swatch.style.background = record.colors[j];
      button.append(swatch, words(name));
      button.addEventListener("click", () => choose(j));
      return button;
    }));
  }

  function open(clip) {
    state.clip = clip;
    state.frame = clips[clip].start;
    part("clip").value = String(clip);
    part("frame").max = String(frames().length - 1);
    part("frame").value = String(state.frame);
    part("frame").disabled = frames().length === 1;
    part("draw-truth").closest("label").hidden = !frames().some((f) => f.record.truth);
    buttons();
    choose(Math.min(state.joint, shown().record.joints.length - 1));
  }

  part("clip").addEventListener("change", () => open(Number(part("clip").value)));
  part("frame").addEventListener("input", () => { state.frame = Number(part("frame").value); draw(); });
  for (const id of ["draw-pose", "draw-truth"]) part(id).addEventListener("change", draw);

  const tabs = [...root.querySelectorAll("[role=tab]")];
  function turn(tab) {
    root.dataset.tab = tab.dataset.tab;
    for (const other of tabs) {
      other.setAttribute("aria-selected", String(other === tab));
      other.tabIndex = other === tab ? 0 : -1;
    }
  }
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => turn(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      turn(next);
      next.focus();
    });
  });

  // A click on a picture takes the keypoint nearest to it; the buttons do the same.
  for (const canvas of root.querySelectorAll("canvas")) {
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect(), record = shown().record;
      const x = ((event.clientX - box.left) / box.width) * record.size[1] - 0.5;
      const y = ((event.clientY - box.top) / box.height) * record.size[0] - 0.5;
      let best = -1, distance = Infinity;
      record.keypoints.forEach((point, j) => {
        const away = point ? Math.hypot(point[0] - x, point[1] - y) : Infinity;
        if (away < distance) [best, distance] = [j, away];
      });
      if (best >= 0) choose(best);
    });
  }

  return {
    // Offers the clips of a source; those of a negative one belong to all.
    show(source) {
      const own = clips.flatMap((clip, i) => (clip.source < 0 || clip.source === source ? [i] : []));
      part("clip").replaceChildren(...own.map((i) => new Option(clips[i].name, String(i))));
      root.hidden = !own.length;
      if (own.length) open(own[0]);
    },
    open(clip) {
      open(clip);
      document.getElementById("tokens").scrollIntoView();
      part("clip").focus({ preventScroll: true });
    },
  };
}
