// The page: the form, the job that is shown, the list of jobs, and what happens between them.
import { call, follow, local, over } from "./api.js";
import { $, arrange, button, make, say } from "./dom.js";
import { drawing } from "./draw.js";
import * as fields from "./fields.js";
import { card, cancelled, detail, refresh, state } from "./jobs.js";
import { Motion } from "./motion.js";

const empty = $("shown").firstElementChild, models = new Map(), cards = new Map(), followed = new Map();
let memories, model, form = [], extra = [], jobs = new Map(), chosen = location.hash.slice(1), view, limit = 24;

const field = (name) => form.find((one) => one.name === name);
const text = () => field("prompt") ?? form.find((one) => one.required && !one.zone);
const values = (list) => Object.fromEntries(list.map((one) => [one.name, one.get()]));
const pictures = () => form.filter((one) => one.zone);
const motion = new Motion(() => text()?.get() ?? "", () => values(extra));

onunhandledrejection = (event) => {
	event.preventDefault();
	say($("notice"), event.reason.message);
};

// --- the form ---

const show = (id, list) => $(id).replaceChildren(...list.map((one) => one.element));

/** Make the form of a model. */
function use(id) {
	const before = form;
	model = { id, ...models.get(id) };
	const { inputs, loops, motion_off: off, width, height } = model, main = [], more = [], strength = [];
	for (const [name, spec] of Object.entries(inputs)) {
		if (spec.kind === "image") main.push(fields.picture(name, `${width} / ${height}`));
		else if (spec.kind === "field") more.push(fields.file(name, ".npy", spec.help));
		else if (spec.image) continue;
		else if (spec.kind === "choice") more.push(fields.choice(name, spec.options, spec.default, spec.help));
		else if (spec.kind === "text") (spec.default === undefined ? main : more).push(fields.text(name, spec));
		else (name in off ? strength : more).push(fields.number(name, spec, off[name]));
	}
	for (const one of main.filter((it) => it.zone)) {
		const over = Object.entries(inputs).filter(([, { kind, image }]) => image === one.name && kind !== "field");
		if (over[0]) main.push(...drawing(one, over, model));
	}
	const seeds = [fields.seed(), fields.choice("n", [..."123468"], "1")];
	seeds[1].element.firstChild.textContent = "Videos";
	const [loop, another] = Object.values(loops);
	if (loop && !another) {
		const [solver, steps] = loop.default, all = Object.values(loop.solvers).flat();
		more.push(fields.number("steps", { kind: "whole", default: steps, min: Math.min(...all), max: Math.max(...all) }));
		more.push(fields.choice("solver", Object.keys(loop.solvers), solver));
	}
	more.push(fields.choice("output", model.outputs, "mp4"));
	form = [...main, ...seeds, ...strength, ...more];
	for (const one of before) if (one.required) field(one.name)?.set(one.get());
	show("inputs", main);
	show("seeds", seeds);
	show("strength", strength);
	show("settings", more);
	keep({});
	if (text()) text().input.oninput = () => motion.later();
	$("about").textContent = `${id}: ${width} × ${height}, ${model.frames} frames, ${+model.seconds.toFixed(2)} s`;
	$("model").value = id;
	$("make").disabled = false;
	motion.use(model, memories);
}

/** Settings of an earlier request that have no field of their own. */
function keep(settings) {
	extra = Object.entries(settings).map(([name, value]) => {
		const made = fields.text(name, { default: "" });
		made.set(typeof value === "string" ? value : JSON.stringify(value));
		return made;
	});
	show("extra", extra);
}

/** Pictures to begin with, which the server offers. */
async function offer() {
	const given = await call("/page/examples");
	$("examples").hidden = !given.length || !pictures().length;
	for (const { prompt, picture } of given) {
		const pick = button("", async () => {
			pictures()[0].set(new File([await call(picture, { raw: true })], prompt));
			text()?.set(prompt);
			await motion.automatic();
		}, { className: "open" });
		pick.append(make("img", { src: local(picture), alt: "" }), make("span.caption", prompt));
		$("examples").append(pick);
	}
}

function wrong(name, message) {
	const one = field(name);
	if ($("more").contains(one?.element)) $("more").open = true;
	if (one) one.error(message);
	else say($("notice"), message);
}

async function submit(event) {
	event.preventDefault();
	if ($("make").disabled) return; // Ctrl+Enter comes here too
	say($("notice"), "");
	for (const one of form) one.error("");
	const missing = form.find((one) => one.required && !one.get());
	if (missing) return wrong(missing.name, missing.zone ? "Choose a picture." : "Say what the video shows and how it moves.");
	$("make").disabled = true;
	try {
		const { off, ...clips } = await motion.get(), body = new FormData();
		const all = { model: model.id, ...clips, ...values([...form, ...extra]), ...(off && model.motion_off) };
		for (const [name, value] of Object.entries(all)) if (value !== undefined) body.set(name, value);
		choose((await call("/v1/videos", { method: "POST", form: body })).id);
		await list();
		$("result").scrollIntoView({ block: "nearest" });
	} catch (error) {
		wrong(error.param ?? /^(?:the )?(\w+)/.exec(error.message)?.[1], error.message); // a refusal begins with the field's name
	} finally {
		$("make").disabled = false;
	}
}

// --- jobs ---

const off = (job) => Object.entries(models.get(job.model)?.motion_off ?? {});
const on = {
	isOff: (job) => off(job).length > 0 && off(job).every(([name, value]) => job.motionrt.request[name] === value),
	canBeOff: (job) => !on.isOff(job) && off(job).length > 0 && job.motionrt.references.length > 0,
	async show(id) {
		choose(id);
		await list(); // links expire
		$("result").scrollIntoView();
		$("result-title").focus({ preventScroll: true });
	},
	seed(seed) {
		field("seed").set(seed);
		field("seed").input.focus();
	},
	async cancel(job) {
		know(await call(`/v1/videos/${job.id}/cancel`, { method: "POST" }));
	},
	async compare(job) {
		const { seed, seeds } = job.motionrt, json = { ...models.get(job.model).motion_off, seed, n: seeds.length };
		await call(`/v1/videos/${job.id}/remix`, { method: "POST", json });
		await list();
	},
	async remove(job) {
		if (confirm("Delete this video?")) await call(`/v1/videos/${job.id}`, { method: "DELETE" });
		await list();
	},
	async again(job) {
		const { references, memory, ...request } = job.motionrt.request;
		if (job.model !== model.id && models.has(job.model)) use(job.model);
		for (const one of form) {
			const sent = job.motionrt.files.find((name) => name === one.name || (one.zone && name === "input_reference"));
			const from = `/v1/videos/${job.id}/input?name=${sent}`;
			if (!one.file) one.set(request[one.name]);
			else await one.set(sent && new File([await call(from, { raw: true })], job.prompt));
			delete request[one.name];
		}
		keep(request);
		$("form").scrollIntoView();
		text()?.input.focus({ preventScroll: true });
		await motion.set({ references, memory }, job.motionrt.references);
	},
};

function choose(id) {
	chosen = id;
	history.replaceState(null, "", `#${id}`);
}

/** Take a job as it is now. */
function know(job) {
	if (!jobs.has(job.id)) return; // it was deleted meanwhile
	jobs.set(job.id, job);
	if (over(job)) $("live").textContent = `${job.prompt || "The video"}: ${job.status === "completed" ? "done" : state(job)}`;
	draw();
}

/** Ask for all jobs, the newest first. */
async function list() {
	const { data, has_more } = await call(`/v1/videos?limit=${limit}`);
	jobs = new Map(data.map((job) => [job.id, job]));
	$("older").hidden = !has_more || limit === 100;
	$("no-jobs").hidden = data.length > 0;
	draw();
}

function draw() {
	const all = [...jobs.values()], job = jobs.get(chosen) ?? all[0];
	const twin = job && all.find((one) => one.remixed_from_video_id === job.id && on.isOff(one) && !cancelled(one));
	const seen = [job?.id, job?.status, job?.motionrt.references.length > 0, twin?.id, twin?.status].join();
	if (view !== seen) {
		const focused = $("shown").contains(document.activeElement);
		view = seen;
		$("shown").replaceChildren(job ? detail(job, twin, on) : empty);
		if (focused) $("result-title").focus({ preventScroll: true });
	}
	document.title = job && !over(job) ? `${job.progress} % · MotionRT` : "MotionRT";
	// Only two streams: a browser opens six connections to a server in all. `look` asks for the other jobs.
	const streams = [job, twin].filter((one) => one && !over(one)).map((one) => one.id);
	for (const [id, end] of followed) if (!streams.includes(id) && followed.delete(id)) end();
	const lost = (why) => say($("notice"), why);
	for (const id of streams) if (!followed.has(id)) followed.set(id, follow(jobs.get(id), know, lost));
	arrange($("jobs"), all.map((one) => {
		const key = one.id + one.status, made = cards.get(key) ?? card(one, on);
		cards.set(key, made);
		made.firstChild.ariaCurrent = one === job;
		return made;
	}));
	refresh(jobs);
}

/** Ask for the jobs that are not followed, while there are any. */
async function look() {
	if (!document.hidden && [...jobs.values()].some((job) => !over(job) && !followed.has(job.id))) await list().catch(() => {});
	setTimeout(look, 1500);
}

async function start() {
	const ready = (await call("/v1/models")).data.filter((one) => one.motionrt);
	say($("notice"), !ready.length && "The server is still opening its models.");
	if (!ready.length) return setTimeout(start, 1000);
	for (const one of ready) models.set(one.id, one.motionrt);
	memories = (await call("/v1/memories")).data;
	$("model").append(...ready.map((one) => make("option", one.id)));
	$("models").hidden = ready.length < 2;
	use(ready[0].id);
	await offer();
	await list();
	look();
}

/** A picture that was dropped or pasted. */
function take(event) {
	const all = pictures(), [file] = (event.clipboardData ?? event.dataTransfer).files;
	if (!file) return; // but text
	event.preventDefault();
	(all.find((one) => one.zone.contains(event.target)) ?? all.find((one) => !one.get()) ?? all[0])?.set(file);
}

$("model").onchange = () => use($("model").value);
$("form").onsubmit = submit;
$("older").onclick = () => {
	limit = 100;
	list();
};
document.onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit(); };
document.onpaste = document.ondrop = take;
document.ondragover = (event) => { if (event.dataTransfer.types.includes("Files")) event.preventDefault(); };
start();
