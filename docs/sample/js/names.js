/** The last part of a URL's path. */
export function nameOf(url) {
  return new URL(url).pathname.split("/").pop();
}
