"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

const startMarks = {
  hooks: {
    draw: (plot) => {
      const { ctx, bbox } = plot;
      ctx.save();
      ctx.strokeStyle = "#b9c2ce";
      for (const step of data.starts) {
        const x = plot.valToPos(step, "x", true);
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
      }
      ctx.restore();
    },
  },
};

const box = document.getElementById("loss");
new uPlot(
  {
    width: box.clientWidth,
    height: 320,
    scales: { x: { time: false } },
    axes: [{ label: "step" }, { label: "nats" }],
    series: [
      { label: "step" },
      { label: "loss", stroke: "#1f6feb", width: 1.5, points: { show: false } },
      { label: "unigram entropy", stroke: "#8b949e", dash: [6, 4], points: { show: false } },
    ],
    plugins: [startMarks],
  },
  [data.step, data.loss, data.step.map(() => data.unigram)],
  box,
);

data.load.forEach((experts, layer) => {
  const title = document.createElement("p");
  title.className = "note";
  title.textContent = `MoE layer ${layer + 1} of ${data.load.length}`;
  const canvas = document.createElement("canvas");
  canvas.className = "load";
  canvas.width = experts[0].length;
  canvas.height = experts.length;
  const context = canvas.getContext("2d");
  experts.forEach((shares, expert) =>
    shares.forEach((share, point) => {
      const dark = Math.min((share * experts.length) / 2, 1);
      context.fillStyle = `rgb(${255 - 224 * dark}, ${255 - 144 * dark}, ${255 - 20 * dark})`;
      context.fillRect(point, expert, 1, 1);
    }),
  );
  document.getElementById("load").append(title, canvas);
});
