// What is drawn on a picture: drags, which are lines of text too, and a brush, which may also be a file.
import { button, make } from "./dom.js";
import { field, PICTURE } from "./fields.js";

const POINTS = 24; // of a drag at most

/** Fields for `inputs` ([name, spec], of kinds tracks and mask) over `picture`, as it is cropped to width x height. */
export function drawing(picture, inputs, { width, height }) {
	const scale = Math.ceil(512 / Math.max(width, height)), canvas = make("canvas", { width: scale * width, height: scale * height });
	const area = [0, 0, canvas.width, canvas.height], mask = make("canvas", { width, height });
	const shown = canvas.getContext("2d"), paint = mask.getContext("2d");
	const done = [], tools = [], image = picture.zone.querySelector("img"); // done: what was drawn, for undo
	let tool, strokes = [], painted = null, line = null;
	// The part of the picture that is kept, in its own pixels.
	const kept = () => {
		const { naturalWidth: w, naturalHeight: h } = image, zoom = Math.max(width / w, height / h) || 1;
		return { zoom, left: (w - width / zoom) / 2, top: (h - height / zoom) / 2 };
	};
	const lines = () => drags?.input.value.split("\n").map((one) => one.trim()).filter(Boolean) ?? [];
	const trace = (context, points, size, colour) => {
		Object.assign(context, { lineWidth: size, strokeStyle: colour, lineCap: "round", lineJoin: "round" });
		context.beginPath();
		context.moveTo(points[0][0], points[0][1] + 0.01); // a line of no length would not be seen
		for (const [x, y] of points) context.lineTo(x, y);
		context.stroke();
	};

	function draw() {
		const { zoom, left, top } = kept();
		paint.clearRect(0, 0, width, height);
		if (painted) {
			const whole = painted.width === width && painted.height === height; // else it lies over the whole picture
			const x = whole ? 1 : painted.width / image.naturalWidth, y = whole ? 1 : painted.height / image.naturalHeight;
			const box = whole ? [0, 0, width, height] : [left * x, top * y, (width / zoom) * x, (height / zoom) * y];
			paint.drawImage(painted, ...box, 0, 0, width, height);
		}
		for (const one of strokes) trace(paint, one, Math.max(width, height) / 8, "#fff");
		shown.clearRect(...area);
		if (painted || strokes[0]) { // what stands still is dark
			shown.fillStyle = "#000a";
			shown.fillRect(...area);
			shown.globalCompositeOperation = "destination-out";
			shown.drawImage(mask, ...area);
			shown.globalCompositeOperation = "source-over";
		}
		const tracks = lines().map((one) => one.split(/\s+/).map((point) => point.split(",").map(Number)));
		if (line && tool === "tracks") tracks.push(line);
		for (const track of tracks) {
			const points = track.map(([x, y]) => [(x - left) * zoom * scale, (y - top) * zoom * scale]), end = points.at(-1);
			const [x, y] = end, [fx, fy] = points.findLast((one) => Math.hypot(one[0] - x, one[1] - y) > 8) ?? [x - 1, y];
			const way = Math.atan2(y - fy, x - fx), side = (by) => [x - 16 * Math.cos(way + by), y - 16 * Math.sin(way + by)];
			for (const [size, colour] of [[8, "#000"], [4, "#fff"]]) {
				trace(shown, points, size, colour);
				if (points[1]) trace(shown, [side(0.5), end, side(-0.5)], size, colour);
				else trace(shown, points, 2 * size, colour); // a pin
			}
		}
	}

	function undo() {
		const last = done.pop();
		if (last === "tracks") drags.input.value = lines().slice(0, -1).join("\n");
		else if (last) strokes.pop();
		draw();
	}

	function clear() {
		done.length = strokes.length = 0;
		painted = line = null;
		if (drags) drags.input.value = "";
		if (brush) brush.input.value = "";
		draw();
	}

	const place = ({ offsetX, offsetY }) => {
		const x = (offsetX / canvas.clientWidth) * width, y = (offsetY / canvas.clientHeight) * height, { zoom, left, top } = kept();
		return tool === "mask" ? [x, y] : [x / zoom + left, y / zoom + top].map((one) => Number(one.toFixed(1)));
	};
	canvas.onclick = (event) => event.preventDefault(); // the label below would ask for another picture
	canvas.onpointerdown = (event) => {
		if (event.button) return;
		canvas.setPointerCapture(event.pointerId);
		line = [place(event)];
		if (tool === "mask") strokes.push(line);
		draw();
	};
	canvas.onpointermove = (event) => {
		if (!line) return;
		line.push(place(event));
		draw();
	};
	canvas.onpointerup = canvas.onpointercancel = () => {
		if (!line) return;
		if (tool === "tracks") {
			const far = Math.max(...line.map(([x, y]) => Math.hypot(x - line[0][0], y - line[0][1]))) * kept().zoom;
			const count = far * 64 < Math.max(width, height) ? 1 : Math.min(POINTS, line.length); // one: a click pins
			const track = Array.from({ length: count }, (_, i) => line[Math.round((i * (line.length - 1)) / Math.max(1, count - 1))]);
			drags.input.value = [...lines(), track.map((point) => point.join(",")).join(" ")].join("\n");
			drags.error("");
		}
		done.push(tool);
		line = null;
		draw();
	};

	const use = (kind) => {
		tool = kind;
		for (const one of tools) one.ariaPressed = one.value === kind;
	};
	const made = inputs.map(([name, { kind, help }]) => {
		const input = kind === "tracks" ? make("textarea", { rows: 2, placeholder: "10,20 30,25", oninput: draw })
			: make("input", PICTURE);
		const one = { ...field(name, help, input), kind };
		tools.push(button(one.element.firstChild.textContent, () => use(kind), { value: kind }));
		return one;
	});
	const drags = made.find((one) => one.kind === "tracks"), brush = made.find((one) => one.kind === "mask");
	if (drags) {
		drags.get = () => (lines()[0] ? JSON.stringify(lines()) : undefined);
		drags.set = (tracks = []) => {
			drags.input.value = tracks.map((one) => (one.map ? one.map((point) => point.join(",")).join(" ") : one)).join("\n");
			draw();
		};
	}
	if (brush) {
		brush.get = () => (painted || strokes[0] ? mask.toDataURL() : undefined);
		brush.set = async (file) => {
			strokes = [];
			painted = file ? await createImageBitmap(file).catch(() => brush.error("This cannot be read; choose a picture.")) : null;
			draw();
		};
		brush.file = true;
		brush.input.onchange = () => brush.set(brush.input.files[0]);
	}
	const another = button("Other picture", () => picture.input.click(), { className: "link" });
	const bar = make("div.row", { role: "toolbar", ariaLabel: "Drawing", hidden: true }, ...tools,
		button("Undo", undo), button("Clear", clear), another);
	picture.zone.append(canvas);
	picture.element.classList.add("drawn");
	picture.element.append(bar);
	canvas.hidden = true;
	picture.picked = () => {
		canvas.hidden = bar.hidden = !picture.get();
		clear();
	};
	image.addEventListener("load", draw);
	use(made[0].kind);
	return made;
}
