// Pictures and clips on the page: small ones in a list, and large ones with boxes and points drawn over them.

import { drawing, element } from "./dom.js";

const NUM_COLOURS = 6;
const SMALL = 200; // pixels of the longer side below which a picture is shown larger than it is

/**
 * Return a picture or clip as an element.
 * @param {import("./attachments.js").Attachment} attachment
 * @param {{hasControls?: boolean, alt?: string}} options Whether a clip can be played; what a picture is called where
 *     its name does not stand beside it.
 */
export function shown(attachment, { hasControls = false, alt = "" } = {}) {
  const name = attachment.name;
  const made = attachment.isClip
    ? element("video", { src: attachment.objectUrl, preload: "metadata", controls: hasControls, "aria-label": name })
    : element("img", { src: attachment.objectUrl, alt });
  made.muted = true;
  made.addEventListener("error", () => {
    // HEIC, say: the server may read it all the same.
    made.replaceWith(element("span", { class: "no-preview" }, `No preview of ${name}`));
  });
  return made;
}

/**
 * Return a figure of a picture or clip with what was found on it, and a list that says the same.
 * @param {import("./attachments.js").Attachment} attachment
 * @param {{label: string, box: number[]}[]} boxes In pixels of the picture.
 * @param {{label: string, point: number[]}[]} points In pixels of the picture.
 */
export function figureOf(attachment, boxes, points) {
  const medium = shown(attachment, { hasControls: true, alt: attachment.name });
  const frame = element("div", { class: "frame" }, medium);
  const places = [
    ...boxes.map(({ label, box }) => ({ label, numbers: box })),
    ...points.map(({ label, point }) => ({ label, numbers: point })),
  ];
  const draw = (width, height) => {
    if (Math.max(width, height) < SMALL) frame.classList.add(width > height ? "small-and-wide" : "small-and-tall");
    frame.append(overlay(places, width, height));
  };
  medium.addEventListener("load", () => draw(medium.naturalWidth, medium.naturalHeight));
  medium.addEventListener("loadedmetadata", () => draw(medium.videoWidth, medium.videoHeight));
  const list = element("ol", { class: "places" }, ...places.map(described));
  const caption = element("figcaption", {}, `Found on ${attachment.name}, in pixels from the top left:`, list);
  return element("figure", {}, frame, caption);
}

/** Return the drawing; its lines and letters have one size, however large the picture is. */
function overlay(places, width, height) {
  const across = (x) => `${(100 * x) / width}%`;
  const down = (y) => `${(100 * y) / height}%`;
  const marks = places.map(({ label, numbers }, index) => {
    const colour = `colour-${index % NUM_COLOURS}`;
    const [x0, y0, x1 = x0, y1 = y0] = numbers;
    const shapes = numbers.length > 2
      ? outlined("rect", { x: across(x0), y: down(y0), width: across(x1 - x0), height: down(y1 - y0) })
      : outlined("circle", { cx: across(x0), cy: down(y0), r: "6" });
    return drawing("g", { class: colour }, ...shapes, nameOf(index, label, { x0, y0, x1, y1 }, width, height));
  });
  return drawing("svg", { class: "overlay", "aria-hidden": "true", focusable: "false" }, ...marks);
}

/** A dark line under a bright one can be seen on any picture. */
function outlined(shape, attributes) {
  return [drawing(shape, { ...attributes, class: "under" }), drawing(shape, { ...attributes, class: "over" })];
}

function nameOf(index, label, { x0, y0, x1, y1 }, width, height) {
  const isRight = x0 > 0.6 * width;
  const isTop = y0 < 0.08 * height;
  const attributes = {
    x: `${(100 * (isRight ? x1 : x0)) / width}%`,
    y: `${(100 * (isTop ? y1 : y0)) / height}%`,
    dy: isTop ? "1.1em" : "-0.4em",
    "text-anchor": isRight ? "end" : "start",
  };
  return drawing("text", attributes, [index + 1, label].filter(Boolean).join(" "));
}

function described({ label, numbers }) {
  const [x0, y0, x1, y1] = numbers.map((each) => Math.round(each));
  const where = numbers.length > 2 ? `box from (${x0}, ${y0}) to (${x1}, ${y1})` : `point at (${x0}, ${y0})`;
  return element("li", {}, label ? element("strong", {}, label) : "", label ? `: ${where}` : where);
}
