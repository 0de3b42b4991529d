"use strict";

const KEEP = 50; // photos on the page
const LONGEST_SIDE = 2048; // px of a photo that is posted: as much as a projector shows
const LOOK_SIDE = 480; // px of a frame that is looked at: as much as the detector needs
const LOOKS_AT_ONCE = 2; // so that one is on its way while the other is looked at
const LONGEST_WAIT = 10_000; // ms until a question is given up, or a picture passed over
const FIRST_DELAY = 500; // ms until it connects again, and each time twice as long
const LONGEST_DELAY = 10_000;
const HEALTH_PAUSE = 15_000; // ms between two questions whether the server is there
const SHARPEST = 1.4; // px of a picture for each of the page, on the fine screens of phones

const $ = (id) => document.getElementById(id);
const clone = (id) => $(id).content.firstElementChild.cloneNode(true);
const count = (n, thing) => `${n} ${thing}${n === 1 ? "" : "s"}`;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const once = (target, name) =>
  new Promise((done) => target.addEventListener(name, done, { once: true }));

// --- Watch: the photos, the newest first ---

let photos = []; // their JSON

async function watch() {
  for (let delay = FIRST_DELAY, before = false; ; delay = Math.min(2 * delay, LONGEST_DELAY)) {
    const url = new URL("faces?format=json", location.href.replace(/^http/, "ws"));
    const socket = new WebSocket(url);
    socket.onopen = () => {
      tell("open", before ? "Connected again" : "Connected");
      delay = FIRST_DELAY;
      before = true;
      remember();
      tellRoom();
    };
    socket.onmessage = ({ data }) => add(JSON.parse(data));
    await Promise.race([once(socket, "close"), silence(socket)]);
    socket.onopen = socket.onmessage = null;
    socket.close();
    tell("away", "The server is away");
    await countDown(delay * (1 + Math.random())); // so that a class does not come back all at once
  }
}

// Where packets are lost, nothing closes: ask for signs of life, until two questions fail.
async function silence(socket) {
  for (let failures = 0; failures < 2 && socket.readyState <= WebSocket.OPEN; failures++) {
    await pause(HEALTH_PAUSE);
    if (await tellRoom()) failures = -1;
  }
}

const ask = (path) =>
  fetch(path, { signal: AbortSignal.timeout(LONGEST_WAIT) })
    .then((response) => (response.ok ? response.json() : null))
    .catch(() => null);

function tell(state, text) {
  $("connection").className = `quiet ${state}`;
  $("state").textContent = text;
}

// A phone that comes out of its pocket, or into the Wi-Fi again, need not wait.
async function countDown(ms) {
  const sooner = [once(document, "visibilitychange"), once(window, "online")];
  for (let rest = ms, woken = null; rest > 0 && !woken; rest -= 1000) {
    $("more").textContent = `trying again in ${Math.ceil(rest / 1000)} s`;
    woken = await Promise.race([...sooner, pause(Math.min(rest, 1000))]);
  }
  $("more").textContent = "";
}

// Show what the server keeps. What arrives while it is asked is newer than its answer.
async function remember() {
  const known = new Set(photos.map((photo) => photo.id));
  const kept = await ask("image");
  if (kept) {
    for (const photo of kept) known.add(photo.id);
    const newer = photos.filter((photo) => !known.has(photo.id));
    photos = [...newer, ...kept].slice(0, KEEP);
    for (const img of document.querySelectorAll("#photos img[src]"))
      if (img.complete && !img.naturalWidth) near.observe(img); // it failed: ask for it again
  } else setTimeout(remember, HEALTH_PAUSE); // the network failed: ask again
  show();
}

function add(photo) {
  if (photos.some((known) => known.id === photo.id)) return; // remember() was faster
  photos = [photo, ...photos].slice(0, KEEP);
  show();
  announce(photo.faces.length);
}

// Show the photos, unless they are held. The cards that are there already stay as they are.
function show() {
  $("empty").hidden = photos.length > 0;
  const cards = new Map([...$("photos").children].map((card) => [card.dataset.id, card]));
  const fresh = photos.filter((photo) => !cards.has(photo.id)).length;
  $("fresh").textContent = count(fresh, "new photo") + (fresh === KEEP ? " or more" : "");
  $("fresh").hidden = fresh === 0 || !isHeld();
  if (isHeld()) return;

  const focused = document.activeElement;
  let next = $("photos").firstElementChild;
  for (const photo of photos) {
    const card = cards.get(photo.id) ?? newCard(photo);
    cards.delete(photo.id);
    if (card === next) next = card.nextElementSibling;
    else $("photos").insertBefore(card, next);
  }
  for (const card of cards.values()) card.remove();
  if (focused === document.activeElement) return;
  const last = $("photos").lastElementChild?.querySelector("a") ?? $("choose");
  (focused.isConnected ? focused : last).focus({ preventScroll: true });
}

function newCard(photo) {
  const card = clone("photo");
  const get = (selector) => card.querySelector(selector);
  const name = photo.filename || "a photo";
  const faces = count(photo.face_count ?? photo.faces.length, "face"); // the list counts them
  const img = get("img");
  card.dataset.id = photo.id;
  get("a").href = `image/${photo.id}`;
  img.alt = `${name}, ${faces}`;
  img.width = photo.width; // so that its room is there before it
  img.height = photo.height;
  get(".name").textContent = get(".name").title = name;
  get(".faces").textContent = faces;
  const size = `${photo.width}\u00a0×\u00a0${photo.height}\u00a0px`;
  get(".size").textContent = `${size}, took ${photo.took_ms}\u00a0ms`;
  get("button").onclick = () => copy(photo.url, get("button"));
  near.observe(img);
  return card;
}

// --- Hold: by the button, or while somebody has scrolled down to look at an older photo ---

let held = false;

const topOfNewest = () => $("photos").firstElementChild?.getBoundingClientRect().top ?? 0;
const isHeld = () => held || topOfNewest() < -innerHeight / 10;

function hold(on) {
  held = on;
  $("hold").textContent = on ? "Release" : "Hold";
  show();
}

$("hold").onclick = () => hold(!held);
$("fresh").onclick = () => {
  scrollTo(0, 0);
  hold(false);
  $("photos").querySelector("a").focus({ preventScroll: true });
};
document.onscroll = () => $("fresh").hidden || show();

// --- The projector: the newest photo and the address alone, large ---

async function toWall(on) {
  document.body.classList.toggle("wall", on);
  $("wall").textContent = on ? "Leave" : "Projector";
  show();
  // An iPhone has no full screen; the rest works there, too.
  if (on) await document.documentElement.requestFullscreen?.().catch(() => {});
  else if (document.fullscreenElement) await document.exitFullscreen();
}

$("wall").onclick = () => toWall(!document.body.classList.contains("wall"));
document.onfullscreenchange = () => document.fullscreenElement || toWall(false);
document.onkeydown = ({ key }) => {
  if (key === "Escape") toWall(false);
};

// --- Pictures: only those near the screen, one at a time, the newest first ---

const wanted = new Set(); // each <img> that is near the screen and not loaded yet
let loading = false;

const near = new IntersectionObserver(
  (changes) => {
    for (const { target, isIntersecting } of changes) {
      if (isIntersecting) wanted.add(target);
      else wanted.delete(target);
    }
    load();
  },
  { rootMargin: "300px" },
);
const sized = new ResizeObserver((changes) => changes.forEach(({ target }) => fit(target)));

// On a slow network the older ones wait, or never come.
async function load() {
  const newest = () => [...document.querySelectorAll("#photos img")].find((img) => wanted.has(img));
  if (loading) return;
  loading = true;
  for (let img = newest(); img; img = newest()) {
    start(img);
    await Promise.race([once(img, "load"), once(img, "error"), pause(LONGEST_WAIT)]);
  }
  loading = false;
}

// Let the browser choose how large a picture it takes.
function start(img) {
  wanted.delete(img);
  near.unobserve(img);
  const { href } = img.closest("a");
  const width = img.getAttribute("width");
  sized.observe(img);
  fit(img);
  if (width > 480) img.srcset = `${href}?width=480 480w, ${href} ${width}w`; // all there are
  img.src = href;
}

// Say how wide the picture is within its <img>. A card that shrinks keeps what it has.
function fit(img) {
  const inside = (img.clientHeight * img.getAttribute("width")) / img.getAttribute("height");
  const sharp = Math.min(1, SHARPEST / devicePixelRatio);
  const wide = Math.ceil(sharp * Math.min(img.clientWidth, inside));
  if (wide > (parseInt(img.sizes) || 0)) img.sizes = `${wide}px`;
}

window.onbeforeprint = () => document.querySelectorAll("#photos img:not([src])").forEach(start);

// --- Links and news ---

async function copy(url, button) {
  try {
    await navigator.clipboard.writeText(url);
  } catch {
    // By plain http there is no navigator.clipboard, but there is the old way.
    const field = document.createElement("textarea");
    field.value = url;
    field.className = "unseen";
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    button.focus();
    if (!copied) return prompt("Copy this link:", url);
  }
  button.textContent = "Copied";
  await pause(2000);
  button.textContent = "Copy link";
}

const news = { photos: 0, faces: 0 };

// Tell a screen reader, at most once in two seconds.
async function announce(faces) {
  news.faces += faces;
  if (news.photos++) return;
  await pause(2000);
  $("news").textContent = `${count(news.photos, "new photo")}, ${count(news.faces, "face")}`;
  news.photos = news.faces = 0;
}

// --- Messages: they stay until they are dismissed ---

function say(text, again = null) {
  const row = clone("refusal");
  const [retry, dismiss] = row.querySelectorAll("button");
  row.querySelector("p").textContent = text;
  retry.hidden = again === null;
  retry.onclick = () => {
    close(row);
    again();
  };
  dismiss.onclick = () => close(row);
  $("refusals").prepend(row);
  return row;
}

// The focus goes to the next message, and from the last one back to the top.
function close(row) {
  const neighbour = row.nextElementSibling ?? row.previousElementSibling;
  (neighbour?.querySelector(".dismiss") ?? $("choose")).focus();
  row.remove();
}

$("dismiss").onclick = () => [...$("refusals").children].forEach(close);

// Say it to a person with a phone: without the options of the server.
function explain(status, problem, size) {
  if (status === 0) return "The server cannot be reached. Are you still in its Wi-Fi?";
  if (status === 408) return "It took too long to arrive. Try again where the Wi-Fi is better.";
  if (status === 503) return "The server has too much to do just now. Try again in a moment.";
  if (status === 413) {
    const limit = Math.floor(problem?.limit / 2 ** 20); // of bytes; a proxy tells none
    const takes = limit ? `The server takes ${limit} MB at most.` : "The server takes less.";
    return `It has ${Math.ceil(size / 2 ** 20)} MB. ${takes}`;
  }
  const detail = problem?.detail ?? `The server answered ${status}.`;
  return detail.replace(/ \((--|[A-Z_]{5})[^)]*\)/g, "");
}

// --- Post ---

const queue = { files: [], total: 0, request: null };
let longestUpload = 60_000; // ms, until the server says its own limit

// Post files one after the other, behind those that are under way.
async function postAll(files) {
  queue.files.push(...files);
  queue.total += files.length;
  if (queue.total > files.length) return;
  while (queue.files.length) await postNext(queue.files.shift());
  if ($("upload").contains(document.activeElement)) $("choose").focus();
  $("upload").hidden = true;
  queue.total = 0;
}

async function postNext(file) {
  const [words, bar] = $("upload").children;
  const name = file.name || "The photo";
  const number = queue.total - queue.files.length;
  words.textContent = queue.total === 1 ? name : `${number} of ${queue.total}: ${name}`;
  bar.ariaLabel = words.textContent;
  bar.removeAttribute("value"); // not known yet
  $("upload").hidden = false;
  const photo = await smaller(file);
  try {
    if (queue.total) await post(photo, (part) => (bar.value = part));
  } catch ({ status, problem }) {
    if (!queue.total) return; // it was cancelled
    const again = [0, 408, 503].includes(status) ? () => postAll([file]) : null; // it may pass
    say(`${name}: ${explain(status, problem, photo.size)}`, again);
  }
}

$("cancel").onclick = () => {
  queue.files.length = queue.total = 0;
  queue.request?.abort();
};

// Throws the status and the problem of a refusal. fetch() would not tell the progress.
function post(file, progress) {
  return new Promise((done, failed) => {
    const form = new FormData();
    form.append("image", file, file.name);
    const request = (queue.request = new XMLHttpRequest());
    request.upload.onprogress = ({ loaded, total }) => progress(loaded / total);
    request.responseType = "json";
    request.timeout = longestUpload;
    request.onloadend = () => {
      if (request.status === 201) done();
      else failed({ status: request.status, problem: request.response });
    };
    request.open("POST", "image");
    request.send(form);
  });
}

// Make a large photo smaller, and one that the server cannot read a JPEG (HEIC, where the browser
// can). Any other file stays as it is.
async function smaller(file) {
  const img = new Image();
  img.src = URL.createObjectURL(file);
  try {
    await img.decode(); // upright, by its EXIF
    const { naturalWidth: width, naturalHeight: height } = img;
    const readable = /^image\/(jpeg|png|webp|gif)$/.test(file.type);
    if (readable && Math.max(width, height) <= LONGEST_SIDE) return file;
    const jpeg = await toJpeg(img, width, height, LONGEST_SIDE, 0.9);
    return new File([jpeg], `${file.name.replace(/\.\w+$/, "")}.jpg`, { type: "image/jpeg" });
  } catch {
    return file; // the browser cannot; perhaps the server can
  } finally {
    URL.revokeObjectURL(img.src);
  }
}

// Make a JPEG of an image or a video, its longer side no longer than `longest`.
function toJpeg(source, width, height, longest, quality) {
  const scale = Math.min(1, longest / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "white"; // behind what is transparent
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(source, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", quality));
}

for (const input of document.querySelectorAll("input[type=file]")) {
  input.onchange = () => {
    postAll([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  };
}
document.onpaste = ({ clipboardData: { files } }) => {
  if (files.length) postAll([...files]);
  else say("There is no photo in what you pasted. Copy a picture, or its file.");
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.toggle("over", event.dataTransfer.types.includes("Files"));
};
document.ondragleave = (event) => event.relatedTarget ?? document.body.classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  postAll([...event.dataTransfer.files]);
};

// --- The live camera: the video stays here, the server looks at small copies of its frames ---

const video = document.querySelector("video");
const boxes = document.querySelector("canvas");
const camera = {
  stream: null, // while it is on
  starting: false,
  frame: 0, // the number of the newest one that was looked at
  sent: 0, // the number of the newest frame under way
  drawn: 0, // that of the one whose boxes are shown
  times: [], // when the last looks were answered
  message: null, // why it is off
};

async function startCamera() {
  camera.message?.remove();
  if (!navigator.mediaDevices) {
    const here = `http://localhost${location.port && `:${location.port}`} on its own machine`;
    return stopCamera(`The live camera needs https, or ${here}. Here, post a photo instead.`);
  }
  if (camera.starting) return; // not disabled meanwhile, which would lose the focus
  camera.starting = true;
  try {
    const wish = { facingMode: "user", width: { ideal: 1280 }, height: { ideal: 720 } };
    camera.stream = await navigator.mediaDevices.getUserMedia({ video: wish });
    video.srcObject = camera.stream;
    $("camera").hidden = false;
    await video.play();
    if (!camera.stream) return; // it was stopped meanwhile
  } catch (error) {
    const words = {
      AbortError: "", // it was stopped before it started
      NotAllowedError: "The browser was not allowed to use the camera. Allow it at the address.",
      NotFoundError: "There is no camera.",
      OverconstrainedError: "There is no camera.", // so WebKit says it
      NotReadableError: "Another program has the camera.",
    };
    return stopCamera(words[error.name] ?? `The camera does not start: ${error.message}`);
  } finally {
    camera.starting = false;
  }
  const [track] = camera.stream.getVideoTracks();
  track.onended = () => stopCamera("The camera went away.");
  // As people know themselves from a mirror; but not what the camera on a phone's back sees.
  const onTheBack = track.getSettings().facingMode === "environment";
  document.querySelector(".view").classList.toggle("mirrored", !onTheBack);
  $("live").firstChild.data = "Stop the camera";
  if (document.hidden) return stopCamera("The camera stopped, as the page was hidden.");
  for (let i = 0; i < LOOKS_AT_ONCE; i++) look(camera.stream);
}

function stopCamera(why = "") {
  for (const track of camera.stream?.getTracks() ?? []) track.stop();
  camera.stream = video.srcObject = null;
  camera.times = [];
  $("live").firstChild.data = "Live camera";
  $("seen").textContent = "Looking";
  $("rate").textContent = "0";
  $("camera").hidden = true;
  draw([], 1);
  camera.message?.remove();
  camera.message = why ? say(why) : null;
}

// Wait for a frame that nobody has looked at.
async function newFrame() {
  const next = (seen) => video.requestVideoFrameCallback((now, frame) => seen(frame));
  const { presentedFrames } = await new Promise(next);
  if (presentedFrames === camera.frame) return newFrame();
  camera.frame = presentedFrames;
}

// Have the server look at frame after frame. Two of these run, each with one request under way.
async function look(stream) {
  for (;;) {
    await newFrame();
    if (camera.stream !== stream) return;
    const number = ++camera.sent;
    const frame = await toJpeg(video, video.videoWidth, video.videoHeight, LOOK_SIDE, 0.8);
    const request = { method: "POST", body: frame, signal: AbortSignal.timeout(LONGEST_WAIT) };
    const response = await fetch("detect", request).catch(() => null);
    const answer = await response?.json().catch(() => null);
    if (camera.stream !== stream) return;
    if (response?.ok) {
      tellRate(performance.now());
      if (number < camera.drawn) continue; // a newer one was faster
      camera.drawn = number;
      draw(answer.faces, video.videoWidth / answer.width);
      $("seen").textContent = count(answer.faces.length, "face");
    } else if (!response || response.status === 503) {
      draw([], 1);
      $("seen").textContent = response ? "The server is busy" : "The server is away";
      await pause(1000); // and then it tries again
    } else {
      const why = explain(response.status, answer, frame.size);
      return stopCamera(`The camera stopped. ${why}`);
    }
  }
}

function draw(faces, scale) {
  boxes.width = video.videoWidth; // which clears it
  boxes.height = video.videoHeight;
  const pen = boxes.getContext("2d");
  const line = Math.max(2, boxes.width / 200);
  pen.scale(scale, scale);
  for (const black of [true, false]) {
    // A black edge, to stand out from what is green itself.
    pen.strokeStyle = black ? "black" : "lime";
    pen.lineWidth = (black ? 2 * line : line) / scale;
    for (const face of faces) pen.strokeRect(face.x, face.y, face.width, face.height);
  }
  boxes.ariaLabel = `Your camera, ${count(faces.length, "face")}`;
}

function tellRate(now) {
  const { times } = camera;
  times.push(now);
  while (times.length > 2 && now - times[0] > 2000) times.shift();
  const seconds = (now - times[0]) / 1000;
  if (seconds > 0) $("rate").textContent = Math.round((times.length - 1) / seconds);
}

$("live").onclick = () => (camera.stream ? stopCamera() : startCamera());
$("shoot").onclick = async () => {
  const picture = await toJpeg(video, video.videoWidth, video.videoHeight, LONGEST_SIDE, 0.9);
  postAll([new File([picture], "camera.jpg", { type: "image/jpeg" })]);
};
document.onvisibilitychange = () => {
  if (document.hidden && camera.stream) stopCamera("The camera stopped, as the page was hidden.");
};

// --- The room: who is there, and how others come in ---

// Tell whether the server is there, and if so, show how many watch and the address for others.
async function tellRoom() {
  const room = await ask("health");
  if (!room) return false;
  const { clients, join: url } = room;
  $("more").textContent = `${clients} watching`;
  longestUpload = 1000 * (room.upload_timeout + 20); // s more, for the answer
  const alone = /^https?:..(localhost|127\.|\[::1\]|0\.0\.0\.0)/.test(url);
  $("alone").hidden = !alone;
  for (const part of document.querySelectorAll(".others")) part.hidden = alone;
  for (const words of document.querySelectorAll(".url")) words.textContent = url.replace(/\/$/, "");
  for (const code of document.querySelectorAll(".code")) code.src = `join.png?${url}`;
  return true;
}

$("hint").hidden = Boolean(navigator.mediaDevices);
$("curl").textContent = `curl -F image=@photo.jpg ${new URL("image", location.href)}`;

watch();
