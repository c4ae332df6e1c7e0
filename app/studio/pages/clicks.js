// Hands the data- attributes of whatever was pressed to Python.
const press = (event) => {
  const button = event.target.closest('[data-act]');
  if (button) trigger('click', {...button.dataset});
};
element.addEventListener('click', press);
// A button does this by itself, a point of a picture does not.
element.addEventListener('keydown', (event) => {
  if (['Enter', ' '].includes(event.key) && event.target.tagName !== 'BUTTON') { event.preventDefault(); press(event); }
});
