// One video, or two in step: the first leads, and the other is held to its clock.
const videos = () => [...element.querySelectorAll('video')];
const fps = () => Number(element.querySelector('.zg-player')?.dataset.fps || 16);
let wanted = true, held = false;
const show = () => {
  const [lead] = videos(), bar = element.querySelector('input[type=range]');
  if (!lead || !bar) return;
  if (!held && lead.duration) bar.value = 1000 * lead.currentTime / lead.duration;
  element.querySelector('.zg-time').textContent =
    `frame ${Math.min(Math.floor(lead.currentTime * fps() + 0.01) + 1, Math.round((lead.duration || 0) * fps()))}`;
  const play = element.querySelector('[data-act=play]');
  play.textContent = lead.paused ? '▶' : '❚❚';
  play.setAttribute('aria-label', lead.paused ? 'Play' : 'Pause');
};
const follow = () => {
  const [lead, ...others] = videos();
  for (const other of others)
    if (Math.abs(other.currentTime - lead.currentTime) > 0.75 / fps()) other.currentTime = lead.currentTime;
};
const seek = (seconds) => {
  const [lead] = videos();
  const end = Math.max((lead.duration || 0) - 0.5 / fps(), 0);
  for (const video of videos()) video.currentTime = Math.min(Math.max(seconds, 0), end);
};
const run = (on) => { wanted = on; for (const video of videos()) on ? video.play().catch(() => {}) : video.pause(); };
const act = {
  play: () => run(videos()[0].paused),
  back: () => { run(false); seek(videos()[0].currentTime - 1 / fps()); },
  on: () => { run(false); seek(videos()[0].currentTime + 1 / fps()); },
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (button && videos().length) act[button.dataset.act]();
});
element.addEventListener('input', (event) => {
  const [lead] = videos();
  if (lead && event.target.type === 'range') { held = true; seek(event.target.value / 1000 * (lead.duration || 0)); }
});
element.addEventListener('change', (event) => {
  held = false;
  if (event.target.tagName === 'SELECT')
    for (const video of videos()) video.playbackRate = Number(event.target.value);
});
// These do not bubble, so they are caught on their way down.
for (const name of ['play', 'pause', 'timeupdate', 'seeked', 'loadeddata']) element.addEventListener(name, show, true);
element.addEventListener('timeupdate', follow, true);
element.addEventListener('ended', (event) => { if (event.target === videos()[0]) { seek(0); run(wanted); } }, true);
element.addEventListener('loadeddata', () => {
  if (videos().every((video) => video.readyState >= 2) && wanted) { seek(0); run(true); }
}, true);
