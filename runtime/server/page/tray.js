// The pictures and clips of the next question: added by file, by dropping and by pasting, and taken off again.

import { readAttachment } from "./attachments.js";
import { button, byId, element } from "./dom.js";
import { shown } from "./media.js";

/** The list of attachments above the question. */
export class Tray {
  /** @param {{say: (text: string) => void, warn: (text: string) => void}} voice */
  constructor(voice) {
    this.#voice = voice;
    this.#list = byId("attachments");
    const files = byId("files");
    byId("add-files").addEventListener("click", () => files.click());
    files.addEventListener("change", async () => {
      const chosen = [...files.files];
      files.value = ""; // the same file can be chosen again
      await this.add(chosen);
    });
    document.addEventListener("paste", (event) => this.#takeFiles(event, event.clipboardData));
    this.#listenToDrops();
  }

  #voice;
  #list;
  #attachments = [];
  #reading = Promise.resolve();

  /** Read files and add them, in their order, after those that are still being read. */
  add(files) {
    this.#reading = this.#reading.then(() => this.#addEach(files));
    return this.#reading;
  }

  async #addEach(files) {
    for (const file of files) {
      try {
        const attachment = await readAttachment(file);
        this.#attachments.push(attachment);
        this.#list.append(this.#entry(attachment));
        this.#voice.say(`${attachment.name} is attached`);
      } catch (error) {
        this.#voice.warn(error.message);
      }
    }
  }

  /** Return all attachments as soon as they are read, and leave none. */
  async take() {
    await this.#reading;
    const taken = this.#attachments;
    this.#attachments = [];
    this.#list.replaceChildren();
    return taken;
  }

  /** Put attachments back, before what was added since. */
  putBack(attachments) {
    this.#attachments.unshift(...attachments);
    this.#list.prepend(...attachments.map((each) => this.#entry(each)));
  }

  #entry(attachment) {
    const entry = element("li", {}, shown(attachment), element("span", { class: "name" }, attachment.name));
    const label = `Remove ${attachment.name}`;
    entry.append(button("×", () => this.#remove(attachment, entry), { class: "remove", "aria-label": label, title: label }));
    return entry;
  }

  #remove(attachment, entry) {
    const next = entry.nextElementSibling ?? entry.previousElementSibling;
    this.#attachments.splice(this.#attachments.indexOf(attachment), 1);
    entry.remove();
    attachment.release();
    (next?.querySelector("button") ?? byId("add-files")).focus();
    this.#voice.say(`${attachment.name} is removed`);
  }

  #takeFiles(event, transfer) {
    const files = [...(transfer?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    this.add(files);
  }

  #listenToDrops() {
    const hint = byId("drop-hint");
    let depth = 0; // the elements that the pointer has entered and not left
    const show = (change) => {
      depth = Math.max(0, depth + change);
      hint.hidden = depth === 0;
    };
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragenter", (event) => hasFiles(event) && show(1));
    document.addEventListener("dragleave", (event) => hasFiles(event) && show(-1));
    // Without this, a browser opens the file in place of the page.
    document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      show(-depth);
      this.#takeFiles(event, event.dataTransfer);
    });
  }
}
