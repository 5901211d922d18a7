// Videos side by side that play, stop and seek together.
import { button, make, still } from "./dom.js";

/** The bar that moves `videos`; they last equally long, or are taken as if they did. `frames`: of the first. */
export function player(videos, frames) {
	const [first] = videos, toggle = button("", () => run(!running), { className: "icon" });
	const slide = make("input", { type: "range", min: 0, max: frames - 1, ariaLabel: "Frame" }), number = make("output");
	const part = () => first.currentTime / (first.duration || 1);
	const seek = (to) => { for (const video of videos) if (video.duration) video.currentTime = to * video.duration; };
	const show = (frame) => {
		slide.value = frame;
		number.value = `${frame + 1} / ${frames}`;
	};
	let running;
	const draw = () => {
		if (!running) return;
		if (!first.isConnected) return run(false);
		show(Math.min(frames - 1, Math.floor(part() * frames + 0.01)));
		for (const video of videos) {
			const where = part() * video.duration;
			if (!video.seeking && Math.abs(video.currentTime - where) > 0.15) video.currentTime = where;
		}
		requestAnimationFrame(draw);
	};
	function run(on) {
		running = on;
		toggle.textContent = on ? "❚❚" : "▶";
		toggle.ariaLabel = on ? "Pause" : "Play";
		for (const video of videos) on ? video.play().catch(() => {}) : video.pause();
		if (on) requestAnimationFrame(draw);
	}
	slide.oninput = () => {
		const frame = Number(slide.value);
		run(false);
		seek((frame + 0.5) / frames);
		show(frame);
	};
	first.onended = () => {
		seek(0);
		if (running) for (const video of videos) video.play().catch(() => {});
	};
	let waiting = videos.length;
	const ready = () => --waiting || still || run(true);
	for (const video of videos) for (const event of ["canplay", "error"]) video.addEventListener(event, ready, { once: true });
	show(0);
	run(false);
	return make("div.row", { role: "group", ariaLabel: "Player" }, toggle, slide, number);
}
