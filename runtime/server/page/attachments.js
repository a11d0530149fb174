// Pictures and clips: files that were dropped, pasted or chosen, as the API and the page want them.

// Types by ending, for files whose type the browser does not know.
const TYPES = {
  avif: "image/avif",
  heic: "image/heic",
  heif: "image/heif",
  jp2: "image/jp2",
  ppm: "image/x-portable-pixmap",
  tif: "image/tiff",
  tiff: "image/tiff",
  avi: "video/x-msvideo",
  m4v: "video/mp4",
  mkv: "video/x-matroska",
  mov: "video/quicktime",
  mp4: "video/mp4",
  webm: "video/webm",
};

/** A picture or a clip in a conversation. */
export class Attachment {
  /**
   * @param {string} name
   * @param {boolean} isClip
   * @param {string} dataUrl What is sent.
   * @param {string} objectUrl What is shown.
   */
  constructor(name, isClip, dataUrl, objectUrl) {
    this.name = name;
    this.isClip = isClip;
    this.dataUrl = dataUrl;
    this.objectUrl = objectUrl;
  }

  /** Return the part of a message that it is; `url` stands in for what is sent. */
  toPart(url = this.dataUrl) {
    return this.isClip ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } };
  }

  /** Let the browser forget its contents. */
  release() {
    URL.revokeObjectURL(this.objectUrl);
  }
}

/**
 * Read a file.
 * @param {File} file
 * @returns {Promise<Attachment>}
 * @throws {Error} It is neither a picture nor a clip, or cannot be read.
 */
export async function readAttachment(file) {
  const name = file.name || "pasted picture";
  const type = file.type || TYPES[name.split(".").pop().toLowerCase()] || "";
  const isClip = type.startsWith("video/");
  if (!isClip && !type.startsWith("image/")) {
    throw new Error(`${name} is neither a picture nor a clip. Choose a file such as a PNG, JPEG, WebP or MP4.`);
  }
  if (type.startsWith("image/svg")) {
    throw new Error(`${name} is a drawing in SVG, which models do not take. Save it as PNG first.`);
  }
  if (!file.size) throw new Error(`${name} is empty. Choose another file.`);
  const typed = file.type === type ? file : new Blob([file], { type });
  return new Attachment(name, isClip, await dataUrlOf(typed, name), URL.createObjectURL(typed));
}

function dataUrlOf(blob, name) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${name} cannot be read. Choose it again; it may have been moved or changed.`));
    reader.readAsDataURL(blob);
  });
}
