// Hands the data- attributes of whatever was pressed to Python.
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (button) trigger('click', {...button.dataset});
});
