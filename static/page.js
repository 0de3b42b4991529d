"use strict";

const KEEP = 50; // photos on the page
const LONGEST_SIDE = 2048; // px of a photo that is posted: as much as a projector shows
const LOOK_SIDE = 480; // px of a frame that is looked at: as much as the detector needs
const LOOKS_AT_ONCE = 2; // so that one is on its way while the other is looked at
const LONGEST_LOOK = 10_000; // ms until a look is given up
const FIRST_DELAY = 500; // ms until it connects again, and each time twice as long
const LONGEST_DELAY = 10_000;

const $ = (id) => document.getElementById(id);
const clone = (id) => $(id).content.firstElementChild.cloneNode(true);
const count = (n, thing) => `${n} ${thing}${n === 1 ? "" : "s"}`;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const once = (target, name) =>
  new Promise((done) => target.addEventListener(name, done, { once: true }));

// --- Watch: the photos, the newest first ---

let photos = []; // their JSON, in the order in which they are shown
let arrived = []; // those that the websocket brought since it opened

async function watch() {
  for (let delay = FIRST_DELAY, before = false; ; delay = Math.min(2 * delay, LONGEST_DELAY)) {
    const url = new URL("faces?format=json", location.href.replace(/^http/, "ws"));
    const socket = new WebSocket(url);
    socket.onmessage = (message) => add(JSON.parse(message.data));
    socket.onopen = () => {
      tell("open", before ? "Connected again" : "Connected");
      delay = FIRST_DELAY;
      before = true;
      arrived = [];
      remember();
    };
    await once(socket, "close");
    const wait = delay * (1 + Math.random()); // so that a class does not come back all at once
    tell("away", `The server is away, trying again in ${Math.ceil(wait / 1000)} s`);
    // A phone that comes out of its pocket, or into the Wi-Fi again, need not wait.
    await Promise.race([pause(wait), once(document, "visibilitychange"), once(window, "online")]);
  }
}

function tell(state, text) {
  $("state").className = `quiet ${state}`;
  $("state").textContent = text;
}

// Show what the server keeps. What arrived while it was asked is newer than its answer.
async function remember() {
  const response = await fetch("image", { cache: "no-store" }).catch(() => null);
  if (!response?.ok) return show(photos); // those and the new ones are better than nothing
  const kept = await response.json();
  const ids = new Set(kept.map((photo) => photo.id));
  show([...arrived.filter((photo) => !ids.has(photo.id)), ...kept]);
}

function add(photo) {
  arrived.unshift(photo);
  if (photos.some((known) => known.id === photo.id)) return; // remember() was faster
  show([photo, ...photos]);
  announce(photo.faces.length);
}

// Show these photos and no others. The cards that are there already stay as they are.
function show(list) {
  photos = list.slice(0, KEEP);
  $("empty").hidden = photos.length > 0;
  const cards = new Map([...$("photos").children].map((card) => [card.dataset.id, card]));
  let next = $("photos").firstElementChild;
  for (const photo of photos) {
    const card = cards.get(photo.id) ?? newCard(photo);
    cards.delete(photo.id);
    if (card === next) next = card.nextElementSibling;
    else $("photos").insertBefore(card, next);
  }
  for (const card of cards.values()) card.remove();
}

function newCard(photo) {
  const card = clone("photo");
  const get = (selector) => card.querySelector(selector);
  const name = photo.filename || "a photo";
  const faces = count(photo.faces.length, "face");
  const img = get("img");
  card.dataset.id = photo.id;
  get("a").href = `image/${photo.id}`;
  img.alt = `${name}, ${faces}`;
  img.width = photo.width; // so that its room is there before it
  img.height = photo.height;
  get(".name").textContent = get(".name").title = name;
  get(".faces").textContent = faces;
  const size = `${photo.width} × ${photo.height} px`.replaceAll(" ", "\u00a0"); // on one line
  get(".size").textContent = `${size}, took ${photo.took_ms}\u00a0ms`;
  get("button").onclick = () => copy(photo.url, get("button"));
  near.observe(img);
  return card;
}

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

// On a slow network the older ones wait, or never come.
async function load() {
  const newest = () => [...document.querySelectorAll("#photos img")].find((img) => wanted.has(img));
  if (loading) return;
  loading = true;
  for (let img = newest(); img; img = newest()) {
    wanted.delete(img);
    near.unobserve(img);
    img.src = img.closest("a").href;
    await Promise.race([once(img, "load"), once(img, "error")]);
  }
  loading = false;
}

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

$("dismiss").onclick = () => {
  $("refusals").replaceChildren();
  $("choose").focus();
};

// Say it to a person with a phone: without the options of the server, but with its numbers.
function explain(status, detail, size) {
  if (status === 0) return "The server cannot be reached. Are you still in its Wi-Fi?";
  if (status === 408) return "It took too long to arrive. Try again where the Wi-Fi is better.";
  if (status === 503) return "The server has too much to do just now. Try again in a moment.";
  if (status === 413) {
    const number = Number(detail?.match(/\d+/)?.[0]); // in bytes or in MB
    const limit = Math.round(number < 2 ** 20 ? number : number / 2 ** 20);
    const takes = limit ? `The server takes ${limit} MB at most.` : "The server takes less.";
    return `It has ${Math.ceil(size / 2 ** 20)} MB. ${takes}`;
  }
  return detail?.replace(/ \((--|[A-Z_]{5})[^)]*\)/g, "") ?? `The server answered ${status}.`;
}

// --- Post ---

const list = { last: Promise.resolve(), number: 0, length: 0 };

// Post files one after the other, behind those that are under way.
function postAll(files) {
  list.length += files.length;
  for (const file of files) list.last = list.last.then(() => postNext(file));
}

async function postNext(file) {
  const [words, bar] = $("upload").children;
  const name = file.name || "The photo";
  list.number++;
  words.textContent = list.length === 1 ? name : `${list.number} of ${list.length}: ${name}`;
  bar.ariaLabel = words.textContent;
  bar.removeAttribute("value"); // not known yet
  $("upload").hidden = false;
  const photo = await smaller(file);
  try {
    await post(photo, (part) => (bar.value = part));
  } catch ({ status, detail }) {
    const mayPass = [0, 408, 503].includes(status);
    const again = mayPass ? () => postAll([file]) : null;
    say(`${name}: ${explain(status, detail, photo.size)}`, again);
  }
  if (list.number < list.length) return;
  $("upload").hidden = true;
  list.number = list.length = 0;
}

// Throws the status and the detail of a refusal. fetch() would not tell the progress.
function post(file, progress) {
  return new Promise((done, failed) => {
    const form = new FormData();
    form.append("image", file, file.name);
    const request = new XMLHttpRequest();
    request.upload.onprogress = ({ loaded, total }) => progress(loaded / total);
    request.responseType = "json";
    request.onloadend = () => {
      if (request.status === 201) done();
      else failed({ status: request.status, detail: request.response?.detail });
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
document.onpaste = (event) => postAll([...event.clipboardData.files]);
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.toggle("over", event.dataTransfer.types.includes("Files"));
};
document.ondragleave = (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("over");
};
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
  fresh: false, // whether there is a frame that nobody has looked at
  waiting: [], // those who wait for such a frame
  sent: 0, // the number of the newest frame under way
  drawn: 0, // that of the one whose boxes are shown
  times: [], // when the last looks were answered
  message: null, // why it is off
};

async function startCamera() {
  camera.message?.remove();
  if (!navigator.mediaDevices) {
    const here = `http://localhost${location.port && `:${location.port}`}`;
    return stopCamera(
      "Browsers give the live camera only to pages by https, or on the server's own machine at " +
        `${here}. Here, post a photo instead.`,
    );
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
      NotAllowedError:
        "The browser was not allowed to use the camera. Allow it beside the page's address.",
      NotFoundError: "There is no camera.",
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
  watchFrames(camera.stream);
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
  for (const goOn of camera.waiting.splice(0)) goOn(); // to see that it stopped
  camera.message?.remove();
  camera.message = why ? say(why) : null;
}

// Hand each new frame to one that waits for it.
function watchFrames(stream) {
  if (camera.stream !== stream) return;
  const goOn = camera.waiting.shift();
  if (goOn) goOn();
  else camera.fresh = true;
  const next = () => watchFrames(stream);
  if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(next);
  else requestAnimationFrame(next); // in old browsers, where a frame may come twice
}

async function newFrame() {
  if (!camera.fresh) await new Promise((goOn) => camera.waiting.push(goOn));
  camera.fresh = false;
}

// Have the server look at frame after frame. Two of these run, each with one request under way.
async function look(stream) {
  for (;;) {
    await newFrame();
    if (camera.stream !== stream) return;
    const number = ++camera.sent;
    const frame = await toJpeg(video, video.videoWidth, video.videoHeight, LOOK_SIDE, 0.8);
    const request = { method: "POST", body: frame, signal: AbortSignal.timeout(LONGEST_LOOK) };
    const response = await fetch("detect", request).catch(() => null);
    const answer = await response?.json().catch(() => null);
    if (camera.stream !== stream) return;
    if (response?.ok) {
      tellRate();
      if (number < camera.drawn) continue; // a newer one was faster
      camera.drawn = number;
      draw(answer.faces, video.videoWidth / answer.width);
      $("seen").textContent = count(answer.faces.length, "face");
    } else if (!response || response.status === 503) {
      draw([], 1);
      $("seen").textContent = response ? "The server is busy" : "The server is away";
      await pause(1000); // and then it tries again
    } else {
      const why = explain(response.status, answer?.detail, frame.size);
      return stopCamera(`The camera stopped. ${why}`);
    }
  }
}

function draw(faces, scale) {
  if (boxes.width !== video.videoWidth || boxes.height !== video.videoHeight) {
    boxes.width = video.videoWidth;
    boxes.height = video.videoHeight;
  }
  const pen = boxes.getContext("2d");
  const line = Math.max(2, boxes.width / 200);
  pen.clearRect(0, 0, boxes.width, boxes.height);
  pen.scale(scale, scale);
  for (const black of [true, false]) {
    // A black edge, to stand out from what is green itself.
    pen.strokeStyle = black ? "black" : "lime";
    pen.lineWidth = (black ? 2 * line : line) / scale;
    for (const face of faces) pen.strokeRect(face.x, face.y, face.width, face.height);
  }
  pen.resetTransform();
  boxes.ariaLabel = `Your camera, ${count(faces.length, "face")}`;
}

function tellRate() {
  const { times } = camera;
  const now = performance.now();
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

// --- Words that depend on where the page is ---

if (!navigator.mediaDevices) {
  const hint = document.createElement("small");
  const touch = matchMedia("(pointer: coarse)").matches;
  hint.textContent = touch ? "needs https: take a photo instead" : "needs https, or localhost";
  $("live").append(hint);
}
$("curl").textContent = `curl -F image=@photo.jpg ${new URL("image", location.href)}`;
if (/^(localhost|127\.[\d.]+|\[::1\])$/.test(location.hostname)) {
  $("others").textContent =
    "This page's address is good on this machine alone. Start the server with --host 0.0.0.0 " +
    "and open the address that it prints; then it stands here for all.";
} else {
  const address = (location.origin + location.pathname).replace(/\/$/, "");
  $("join").textContent = "Join in at";
  for (const place of [$("others"), $("address")]) {
    place.append(Object.assign(document.createElement("strong"), { textContent: address }));
  }
  $("address").hidden = false;
}

watch();
