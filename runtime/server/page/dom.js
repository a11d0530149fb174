// Elements of the page and of SVG, made without HTML text: what a model or a file says is never read as markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Return a new element.
 * @param {string} name
 * @param {Record<string, string | boolean>} attributes False leaves one out.
 * @param {...(Node | string)} children
 */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** Return a new element of SVG; arguments are those of `element`. */
export function drawing(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

/** Return the element of the page with an id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Return a button.
 * @param {string} label What it says.
 * @param {(event: Event) => void} action
 * @param {Record<string, string>} attributes
 */
export function button(label, action, attributes = {}) {
  const made = element("button", { type: "button", ...attributes }, label);
  made.addEventListener("click", action);
  return made;
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}
