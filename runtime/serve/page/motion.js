// The memory: clips found as the prompt is typed, moving, with scores; kept, dropped, or found by other words.
import { call, local } from "./api.js";
import { $, arrange, make, say, still } from "./dom.js";

const title = (reference) => reference.caption || reference.source || `Clip ${reference.id}`;

/** How likely a clip moves as asked, or its cosine; all that the search says of it; where it is from. */
const likely = ({ probability, score }) => probability == null ? score?.toFixed(2) : `${Math.round(100 * probability)} %`;
const worth = (reference) => Object.entries({ probability: "moves as asked", score: "cosine with the words",
	words: "share of the words", agreement: "moves like the others", looks: "looks like the still" })
	.filter(([name]) => reference[name] != null).map(([name, what]) => `${what}: ${reference[name].toFixed(2)}`).join("\n");
const origin = ({ source, dataset, metadata, start, duration }) => [source, dataset, start != null && `${start} to ${start + duration} s`,
	...Object.entries(metadata ?? {}).map((one) => one.join(": "))].filter(Boolean).join("\n");

export const film = (path, options, tag = "video") =>
	make(tag, { src: local(path), muted: true, playsInline: true, preload: "auto", ...options });

/** A clip that moves (when it is told to, for those who want no motion), with its score. */
export function clip(reference, box) {
	const link = reference.links?.preview, idle = make("span.idle", "no preview");
	const video = link && film(link, { loop: true, autoplay: !still, controls: still });
	if (video) video.onerror = () => video.replaceWith(idle);
	return make(box ? "label" : "div", { className: "clip", title: origin(reference), data: { clip: reference.id } },
		make("span.moving", video || idle, box,
			reference.score && make("span.score", { title: worth(reference) }, likely(reference))),
		make("span.caption", title(reference)));
}

export class Motion {
	/** `prompt()`: the words to search by while no others are typed; `options()`: other fields of the search. */
	constructor(prompt, options) {
		Object.assign(this, { prompt, options, cards: new Map(), found: [], chosen: null });
		$("words").oninput = () => this.later();
		$("memory").onchange = $("automatic").onclick = () => this.automatic();
	}

	/** For another model: its memories, and how many clips it takes. */
	use(model, memories) {
		this.limits = model.references;
		this.canBeOff = Object.keys(model.motion_off).length > 0;
		this.memories = memories.filter((one) => model.memories.includes(one.id));
		this.none = $("motion").hidden = !this.limits || !this.memories.length;
		if (this.none) return;
		$("memory").replaceChildren(...this.memories.map((one) => make("option", one.id)));
		$("memories").hidden = this.memories.length < 2;
		this.automatic();
	}

	/** Use the best again. */
	automatic() {
		this.chosen = null;
		return this.search();
	}

	later() {
		clearTimeout(this.timer);
		this.timer = setTimeout(() => this.search(), 300);
	}

	async search() {
		clearTimeout(this.timer);
		if (this.none) return;
		const asked = (this.asked = {}), text = (this.by = $("words").value.trim() || this.prompt().trim());
		const json = { text, k: Math.max(this.limits.max, 8), ...this.options() }, path = `/v1/memories/${$("memory").value}/search`;
		const found = text ? (await call(path, { method: "POST", json })).data : [];
		if (this.asked !== asked) return; // other words were typed meanwhile
		const kept = [...(this.chosen?.values() ?? [])].filter((one) => !found.some((other) => other.id === one.id));
		this.found = [...kept, ...found];
		this.draw();
	}

	/** The clips that are kept, by id; else those that the server would take. */
	get ticked() {
		const likely = this.found.filter((one) => !(one.probability < this.limits.probable));
		return this.chosen ?? new Map(likely.slice(0, this.limits.default).map((one) => [one.id, one]));
	}

	draw() {
		const { ticked } = this;
		this.cards = new Map(this.found.map((one) => [one.id, this.cards.get(one.id) ?? this.card(one)]));
		for (const [id, card] of this.cards) card.querySelector("input").checked = ticked.has(id);
		arrange($("clips"), [...this.cards.values()]);
		say($("found"), this.summary(ticked.size));
		$("automatic").hidden = !this.chosen;
	}

	summary(number) {
		if (this.chosen && !number) return this.canBeOff ? "No clip is kept: the motion is off." : "Keep at least one clip.";
		if (this.chosen) return `You keep ${number} of at most ${this.limits.max}.`;
		const { clips } = this.memories.find((one) => one.id === $("memory").value);
		if (!this.by) return "Say what happens: clips that move like it appear here.";
		if (number) return `The ${number} best of ${clips} clips are used. Untick what does not fit.`;
		return `There is nothing like it.${this.found[0] ? " Tick what fits nevertheless." : ""}`;
	}

	card(reference) {
		const box = make("input", { type: "checkbox", ariaLabel: `Use “${title(reference)}”, ${likely(reference)}` });
		box.onchange = () => {
			this.chosen = new Map(this.ticked);
			if (!box.checked) this.chosen.delete(reference.id);
			else if (this.chosen.size < this.limits.max) this.chosen.set(reference.id, reference);
			this.draw();
		};
		return clip(reference, box);
	}

	/** What goes into the request; `off`: no clip was kept, so the model is to do without any. */
	async get() {
		if (this.none) return {};
		const other = $("words").value.trim(), memory = this.memories.length > 1 && { memory: $("memory").value };
		if (other && this.by !== other) await this.search();
		if (!this.chosen && !(other && this.found.length)) return { ...memory };
		const ids = [...this.ticked.keys()];
		if (ids.length) return { ...memory, references: JSON.stringify(ids) };
		if (this.canBeOff) return { off: true };
		throw new Error(this.summary(0));
	}

	/** As a job had it. */
	set({ references: given, memory }, references) {
		if (this.none) return;
		$("words").value = "";
		$("memory").value = memory;
		this.chosen = given ? new Map(references.map((one) => [one.id, one])) : null;
		return this.search();
	}
}
