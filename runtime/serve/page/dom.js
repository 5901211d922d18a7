// Elements from plain data: text goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);
export const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

/** make("p.hint", { id: "x", data: { a: 1 } }, …): an element with properties and data-attributes, which may be left out, and
 * children, of which false and empty ones are left out. */
export function make(what, ...children) {
	const [tag, className = ""] = what.split(".");
	const { data, ...options } = children[0]?.constructor === Object ? children.shift() : {};
	const element = Object.assign(document.createElement(tag), { className }, options);
	Object.assign(element.dataset, data);
	element.append(...children.filter(Boolean));
	return element;
}

export const button = (text, onclick, options) => make("button", { type: "button", onclick, ...options }, text);

/** Show `text` in an element that is hidden while there is none. */
export function say(element, text) {
	element.textContent = text || "";
	element.hidden = !text;
}

/** Give `parent` these children, moving only what is not in its place: a video that is taken out of the page stops. */
export function arrange(parent, children) {
	for (const old of [...parent.children]) if (!children.includes(old)) old.remove();
	children.forEach((child, place) => {
		if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
	});
}

export const words = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

export function duration(seconds) {
	if (seconds < 1) return `${Math.ceil(seconds * 1000)} ms`;
	return seconds < 90 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : `${Math.round(seconds / 60)} min`;
}
