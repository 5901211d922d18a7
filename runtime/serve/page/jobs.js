// Jobs as they are shown: cards of the list, and one in full.
import { local, over, save } from "./api.js";
import { button, duration, make, words } from "./dom.js";
import { clip, film } from "./motion.js";
import { player } from "./player.js";

const STAGES = { retrieving: "Finding motion", conditioning: "Preparing", encoding: "Writing" }; // others say it themselves
export const cancelled = (job) => job.error?.code === "cancelled";
const name = (job) => job.prompt || job.id;
const link = (text, about, run) => button(text, run, { className: "link", ariaLabel: text + about });

/** Where a job is, in words. */
export function state(job) {
	const { stage, step, steps, queue_position: place, eta_seconds: left } = job.motionrt, said = [STAGES[stage] ?? words(stage)];
	const made = new Date(job.created_at * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
	if (job.status === "completed") return made;
	if (job.status === "failed") return cancelled(job) ? "Cancelled" : "Failed";
	if (stage === "queued") said[0] = place ? `Waiting, ${place} before it` : "Waiting, next in line";
	if (stage === "denoising") said.push(`step ${Math.min(step + 1, steps)} of ${steps}`);
	if (left !== null) said.push(`about ${duration(left)} left`);
	return said.join(" · ");
}

/** Its first frame, or the still that it was given, until `refresh` has a preview. */
function thumbnail(job) {
	const { links } = job.motionrt, source = links["thumbnail-0"] ?? links.input;
	const image = make("img", { alt: "", data: { of: job.id } });
	if (source) image.src = local(source);
	else image.hidden = true;
	image.style.aspectRatio = job.size.replace("x", "/");
	return image;
}

/** What tells of a job that runs; `refresh` keeps it up to date. */
const progress = (job) => [
	make("p.state", state(job)),
	make("progress", { max: 100, value: job.progress, ariaLabel: `Progress: ${name(job)}`, data: { of: job.id } }),
];

export function refresh(jobs) {
	for (const one of document.querySelectorAll("[data-of]")) {
		const job = jobs.get(one.dataset.of), { preview, eta_seconds: left, links } = job.motionrt, alt = `Preview, step ${preview}`;
		if (one.max) {
			one.value = job.progress;
			one.previousSibling.textContent = state(job);
		} else if (preview && left > 0.3 && one.alt !== alt) { // else it ends first
			Object.assign(one, { src: local(links.preview), alt, hidden: false });
		}
	}
}

/** A card of the list; its first child opens the job. `on`: what can be done; see app.js. */
export function card(job, on) {
	const { seeds } = job.motionrt, open = button("", () => on.show(job.id), { className: "open" });
	open.append(
		make("span.thumb", thumbnail(job), seeds.length > 1 && make("span.score", `${seeds.length} seeds`)),
		make("span.caption", name(job)), make("span.hint", on.isOff(job) && "Motion off · ", over(job) && state(job)),
	);
	const act = (text, run) => link(text, `: ${name(job)}`, () => run(job));
	const acts = over(job) ? [act("Use again", on.again)] : [...progress(job), act("Cancel", on.cancel)];
	return make("li", { data: { job: job.id } }, open, ...acts);
}

function references({ motionrt: { references: found } }) {
	return found[0] && make("section", make("h3", "Motion taken from"), make("div.clips", ...found.map((one) => clip(one))));
}

/** A job in full; `twin`: the same with the motion off, if that was asked for. */
export function detail(job, twin, on) {
	const article = (...parts) => make("article", make("p.prompt", job.prompt), ...parts);
	const actions = make("p.row", button("Use again", () => on.again(job)), link("Delete", "", () => on.remove(job)));
	if (job.status === "completed") return article(...finished(job, twin, on, actions));
	if (over(job)) return article(make("p.error", cancelled(job) ? "You stopped it." : job.error.message), actions);
	const still = make("div.tiles", make("figure", thumbnail(job)));
	return article(still, ...progress(job), button("Cancel", () => on.cancel(job)), references(job));
}

function tiles(job, title, videos, on) {
	const { links, seeds, request: { output } } = job.motionrt;
	return seeds.map((seed, place) => {
		const src = links[`video-${place}`], about = `${title || "Video"}, seed ${seed}`, moves = output === "mp4";
		const media = film(src, { ariaLabel: about }, moves ? "video" : "img");
		if (moves) videos.push(media);
		if (output !== "png") media.style.aspectRatio = job.size.replace("x", "/");
		const act = (text, run) => link(text, ` ${about}`, run);
		const acts = [act("Reuse", () => on.seed(seed)), act("Save", () => save(src, `${job.id}-${seed}.${output}`))];
		return make("figure", media, make("figcaption", title && make("strong", title), `Seed ${seed}`, ...acts));
	});
}

function finished(job, twin, on, actions) {
	const { frames, fallback, notes, links, seeds } = job.motionrt, off = on.isOff(job), videos = [];
	const made = tiles(job, off ? "Motion off" : twin ? "With motion" : "", videos, on);
	const beside = twin?.status === "completed" ? tiles(twin, "Motion off", videos, on) : [];
	if (twin && !over(twin)) beside.push(make("figure", thumbnail(twin), make("strong", "Motion off"), ...progress(twin)));
	const fields = seeds.map((seed, place) => links[`field-${place}`] && make("figure",
		videos[videos.push(film(links[`field-${place}`], { ariaLabel: `Motion field, seed ${seed}` })) - 1],
		make("figcaption", make("strong", "Motion field"), `Seed ${seed}`))).filter(Boolean);
	if (!twin && on.canBeOff(job)) actions.prepend(button("Compare with motion off", () => on.compare(job), { className: "primary" }));
	const clips = !off && references(job), rows = [...(seeds.length > 1 ? [made, beside] : [[...made, ...beside]]), fields];
	// The clips play in step with what was made.
	if (clips && videos[0]) {
		for (const video of clips.querySelectorAll("video")) videos.push(Object.assign(video, { loop: false, autoplay: false }));
	}
	return [
		...rows.map((row) => row[0] && make("div.tiles", ...row)), videos[0] && player(videos, frames),
		fallback && make("p.hint", `Made without clips: ${fallback}`), notes?.[0] && make("p.hint", notes.join(" ")),
		twin?.status === "failed" && make("p.error", `Motion off: ${twin.error.message}`),
		actions, clips, times(job),
	];
}

/** Where the time went, as a bar. */
function times({ motionrt: { seconds, steps } }) {
	const all = Object.entries(seconds), total = all.reduce((sum, [, value]) => sum + value, 0);
	const parts = all.filter(([, value]) => value > total / 25);
	parts.push(["the rest", parts.reduce((rest, [, value]) => rest - value, total)]);
	const bar = make("div.bar"), list = make("ul.legend");
	parts.forEach(([part, value], place) => {
		const piece = make("span"), dot = make("span.dot");
		piece.style.background = dot.style.background = `hsl(${165 + 45 * place} 35% 52%)`;
		piece.style.flexGrow = value / total;
		bar.append(piece);
		const each = part === "step" && ` (${steps} × ${duration(value / steps)})`;
		list.append(make("li", dot, `${words(part)} ${duration(value)}`, each));
	});
	return make("section", make("h3", `Made in ${duration(total)}`), bar, list);
}
