"use strict";
// Data of the page, and what every part builds elements and numbers with.

const SVG = "http://www.w3.org/2000/svg";

/** Returns the parsed content of a data element, or null if the page has none. */
function readElement(id) {
  const element = document.getElementById(id);
  return element === null ? null : JSON.parse(element.textContent);
}

/** Returns the bytes of base64 text. */
function bytesOf(text) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  // Strings become text nodes: nothing of a prompt is read as HTML.
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Makes an HTML element. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Makes an SVG element. */
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function section(id, title, ...children) {
  const heading = make("h2", { id: `${id}-title` }, title);
  return make("section", { id, "aria-labelledby": `${id}-title` }, heading, ...children);
}

let controls = 0;

/** Makes a labelled list of choices; `choices` are texts, the value is their index. */
function choice(label, choices, onchange) {
  const id = `choice-${controls++}`;
  const options = choices.map((text, index) => make("option", { value: index }, text));
  const select = make(
    "select",
    { id, onchange: (event) => onchange(Number(event.target.value)) },
    ...options,
  );
  const whole = make("div", { class: "field" }, make("label", { for: id }, label), select);
  return { whole, select };
}

function number(value, digits) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

function percent(share, digits = 0) {
  return `${number(100 * share, digits)} %`;
}

function decibels(value) {
  return value === null ? "equal" : `${number(value, 1)} dB`;
}

function seconds(milliseconds) {
  const value = milliseconds / 1000;
  if (value < 0.1) return `${number(milliseconds, milliseconds < 10 ? 1 : 0)} ms`;
  if (value < 100) return `${number(value, value < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** Calls back with the element's width now and whenever it changes. */
function onWidth(element, callback) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(element.clientWidth);
    if (width > 0 && width !== last) callback((last = width));
  }).observe(element);
}

/** Sizes a canvas in CSS pixels, sharp on dense screens, and returns its context. */
function contextOf(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  return context;
}

/** Returns a colour of the style sheet, which knows of dark mode. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
