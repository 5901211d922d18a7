// The fields of the form, made from what a model declares. Each is {name, element, get(), set(value), error(text)}:
// get() gives undefined where the model's default holds, and what goes into the form otherwise.
import { button, make, say, words } from "./dom.js";

export const PICTURE = { type: "file", accept: "image/png,image/jpeg,image/webp" };
let last = 0;

export function field(name, help, input, ...beside) {
	const id = (input.id = `field-${++last}`), error = make("p.error", { id: `${id}-error`, hidden: true });
	input.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
	return {
		name, input,
		element: make("div.field", { data: { field: name } }, make("label", { htmlFor: id }, words(name)),
			make("div.row", input, ...beside), help && make("p.hint", { id: `${id}-hint` }, help), error),
		get: () => input.value.trim() || undefined,
		set(value) { input.value = value ?? ""; },
		error(text) {
			say(error, text);
			input.ariaInvalid = Boolean(text);
			if (text) input.focus();
		},
	};
}

export function text(name, spec) {
	const required = spec.default === undefined;
	return { ...field(name, spec.help, make("textarea", { rows: required ? 3 : 2, required })), required };
}

/** A slider with the number beside it, which may also lie outside of it; a column takes a number for each step too. */
export function number(name, { kind, help, default: value, min, max }, off = 0) {
	const column = kind === "column", low = min ?? Math.min(0, off, value ?? 0), high = max ?? Math.max(2 * (value ?? 1), low + 1);
	const box = make("input.small", { type: column ? "text" : "number", step: "any", ariaLabel: `${words(name)}, as a number` });
	if (value === undefined) return field(name, help, box);
	const slide = make("input", { type: "range", min: low, max: high, step: kind === "whole" ? 1 : (high - low) / 100 });
	slide.oninput = () => { box.value = slide.value; };
	box.oninput = () => { slide.value = box.value; };
	const made = {
		...field(name, help, slide, box),
		get() {
			const typed = box.value.trim();
			if (column && typed.includes(",")) return `[${typed}]`;
			return typed === "" || Number(typed) === value ? undefined : typed;
		},
		set(next) { box.value = slide.value = next ?? value; }, // a list as text is its numbers with commas
	};
	made.set();
	return made;
}

export function choice(name, options, value, help) {
	const input = make("select", ...options.map((one) => make("option", one)));
	const set = (next) => { input.value = next ?? value; };
	set();
	return { ...field(name, help, input), set, get: () => (input.value === value ? undefined : input.value) };
}

/** A file that need not be given. */
export function file(name, accept, help) {
	const input = make("input", { type: "file", accept });
	const set = (value) => {
		const all = new DataTransfer();
		if (value) all.items.add(value);
		input.files = all.files;
	};
	return { ...field(name, help, input), file: true, get: () => input.files[0], set };
}

export function seed() {
	const input = make("input", { inputMode: "numeric", placeholder: "New each time" });
	const roll = () => { input.value = Math.floor(Math.random() * 2 ** 31); };
	return field("seed", "", input, button("⚄", roll, { className: "icon", title: "Roll a seed", ariaLabel: "Roll a seed" }));
}

/** A still: dropped, pasted or picked, and shown as it will be cropped. `ratio`: width over height of the video. */
export function picture(name, ratio) {
	const input = make("input", { ...PICTURE, className: "unseen", required: true });
	const shown = make("img", { alt: "", hidden: true });
	const idle = make("span.idle", make("strong", "Drop, paste or choose a picture"), "png, jpeg or webp");
	const zone = make("label.drop", idle, shown);
	zone.style.aspectRatio = ratio;
	const made = field(name, "", input, zone);
	zone.htmlFor = input.id;
	made.element.classList.add("picture");
	let file = null;

	function take(next) {
		made.error("");
		URL.revokeObjectURL(shown.src);
		file = next ?? null;
		input.value = "";
		shown.hidden = !file;
		idle.hidden = Boolean(file);
		if (file) Object.assign(shown, { src: URL.createObjectURL(file), alt: `The picture: ${file.name}` });
		else shown.removeAttribute("src");
		result.picked?.();
	}
	input.onchange = () => input.files[0] && take(input.files[0]);
	shown.onerror = () => {
		take(null);
		made.error("This cannot be read; choose a png, jpeg or webp.");
	};
	const result = { ...made, zone, required: true, file: true, get: () => file ?? undefined, set: take };
	return result;
}
