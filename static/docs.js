"use strict";

const CDN = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0";
const LONGEST_WAIT = 3000; // ms for the CDN; a network without internet may swallow the question
const STYLE = "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I";
const SCRIPT = "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9";

const clone = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

function load(tag, properties) {
  return new Promise((onload, onerror) => {
    const element = document.createElement(tag);
    Object.assign(element, properties, { crossOrigin: "anonymous", onload, onerror });
    document.head.append(element);
  });
}

// Swagger UI where the CDN answers, else a page of our own from the same document.
async function start() {
  const files = Promise.all([
    load("link", { rel: "stylesheet", href: `${CDN}/swagger-ui.css`, integrity: STYLE }),
    load("script", { src: `${CDN}/swagger-ui-bundle.js`, integrity: SCRIPT }),
  ]);
  const tooLate = new Promise((_, failed) => setTimeout(failed, LONGEST_WAIT));
  try {
    await Promise.race([files, tooLate]);
  } catch {
    const response = await fetch("openapi.json");
    return showOwnPage(await response.json());
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.classList.toggle("dark-mode", dark);
  const options = { dom_id: "#docs", url: "openapi.json", tryItOutEnabled: true };
  SwaggerUIBundle({ ...options, validatorUrl: null });
}

function showOwnPage(api) {
  const page = clone("page");
  page.querySelector("h1").textContent = `The API of ${api.info.title}`;
  describe(page, api.info);
  for (const [path, { parameters = [], ...operations }] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      const all = [...parameters, ...(operation.parameters ?? [])];
      page.append(showOperation(api, method.toUpperCase(), path, { ...operation, parameters: all }));
    }
  }
  document.getElementById("docs").replaceChildren(page);
}

function showOperation(api, method, path, operation) {
  const section = clone("operation");
  const get = (selector) => section.querySelector(selector);
  get("code").textContent = `${method} ${path}`;
  const body = resolve(api, operation.requestBody ?? {});
  const description = [operation.description, body.description].filter(Boolean).join(" ");
  describe(section, { summary: operation.summary, description });
  get("form").hidden = !body.content || method !== "POST";
  get("form").onsubmit = (event) => send(event, path);

  for (const part of operation.parameters.map((each) => resolve(api, each))) {
    list(get("dl.parameters"), `${part.name} (${part.in})`, part.description);
  }
  if (operation.parameters.length === 0) section.querySelectorAll(".parameters").forEach(hide);
  for (const [status, part] of Object.entries(operation.responses)) {
    const answer = resolve(api, part);
    const row = list(get(".answers"), status, answer.description);
    for (const [type, { examples = {} }] of Object.entries(answer.content ?? {})) {
      row.append(` ${type}. `);
      for (const example of Object.values(examples)) showExample(row, resolve(api, example));
    }
  }
  return section;
}

function showExample(row, { summary = "Example", value }) {
  const details = document.createElement("details");
  const pre = document.createElement("pre");
  details.append(Object.assign(document.createElement("summary"), { textContent: summary }), pre);
  pre.textContent = JSON.stringify(value, null, 2);
  row.append(details);
}

// Follow a reference such as #/components/responses/Created.
function resolve(api, part) {
  const names = part.$ref?.split("/").slice(1) ?? [];
  return names.reduce((at, name) => at[name], names.length ? api : part);
}

function describe(element, { summary, description }) {
  element.querySelector(".summary").textContent = summary ?? "";
  element.querySelector(".description").textContent = (description ?? "").replaceAll("`", "");
}

function list(place, term, text) {
  const row = document.createElement("dd");
  row.textContent = text.replaceAll("`", "");
  place.append(Object.assign(document.createElement("dt"), { textContent: term }), row);
  return row;
}

function hide(element) {
  element.hidden = true;
}

// Send the chosen photo, and show the answer.
async function send(event, path) {
  event.preventDefault();
  const [input, , output] = event.target.elements;
  const body = new FormData();
  body.append("image", input.files[0]);
  output.textContent = "Sending";
  try {
    const response = await fetch(path.slice(1), { method: "POST", body });
    output.textContent = `${response.status}\n${await response.text()}`;
  } catch {
    output.textContent = "The server cannot be reached.";
  }
}

start();
