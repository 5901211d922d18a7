// Requests, the API key, and the events of a job.
import { $, make, say } from "./dom.js";

const KEY = "motionrt-key";
const root = new URL(".", document.baseURI).pathname; // the server may be mounted below another address
export const local = (path) => (path.startsWith(root) ? path : root + path.slice(1));
export const over = (job) => job.status === "completed" || job.status === "failed";

/** The JSON that a route answers, or its bytes (`raw`). Throws what the server said, with `status`; asks for a key at 401. */
export async function call(path, { method, json, form, raw } = {}) {
	const key = sessionStorage.getItem(KEY), headers = key ? { Authorization: `Bearer ${key}` } : {};
	if (json) headers["Content-Type"] = "application/json";
	const answer = await fetch(local(path), { method, headers, body: json ? JSON.stringify(json) : form }).catch(() => {
		throw new Error("The server cannot be reached.");
	});
	if (answer.status === 401) {
		await askKey(key);
		return call(path, { method, json, form, raw });
	}
	if (answer.ok) return raw ? answer.blob() : answer.json();
	const { error } = await answer.json().catch(() => ({}));
	throw Object.assign(new Error(error?.message ?? `The server answered ${answer.status}.`), error, { status: answer.status });
}

let asking = null; // one dialog, however many requests wait for it

function askKey(refused) {
	if (refused !== sessionStorage.getItem(KEY)) return; // a newer one is there already
	asking ??= new Promise((resolve) => {
		say($("key-error"), refused && "The server does not take this key.");
		$("ask-key").onclose = () => {
			sessionStorage.setItem(KEY, $("key").value.trim());
			$("key").value = "";
			asking = null;
			resolve();
		};
		$("ask-key").showModal();
	});
	return asking;
}

/** Call `news(job)` whenever a job changes, `lost(why or false)` as the connection goes and comes. Returns how to end it. */
export function follow(job, news, lost) {
	let source, wait = 500, ended = false;
	const heard = (now) => {
		job = now;
		ended ||= over(job);
		if (ended) source.close();
		news(job);
	};
	const open = () => {
		source = new EventSource(local(job.motionrt.links.events));
		for (const name of ["progress", "done"]) source.addEventListener(name, (event) => heard(JSON.parse(event.data)));
		// A stream that broke is opened anew by us, not by the browser: with the link of a fresh answer, as links expire.
		source.onopen = () => { wait = 500; };
		source.onerror = () => {
			source.close();
			setTimeout(again, wait);
		};
	};
	const again = async () => {
		wait = Math.min(wait * 2, 10000);
		const now = await call(`/v1/videos/${job.id}`).catch((error) => error), failed = now instanceof Error;
		if (ended || now.status === 404) return;
		lost(failed && now.message);
		if (failed) return setTimeout(again, wait);
		heard(now);
		if (!ended) open();
	};
	open();
	return () => {
		ended = true;
		source.close();
	};
}

/** Fetch a file, with the key, and give it to the browser to keep. */
export async function save(path, download) {
	const href = URL.createObjectURL(await call(path, { raw: true }));
	make("a", { href, download }).click();
	setTimeout(() => URL.revokeObjectURL(href), 10000);
}
