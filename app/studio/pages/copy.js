// Copies the text beside the button that was pressed.
element.addEventListener('click', async (event) => {
  const button = event.target.closest('[data-copy]');
  if (!button) return;
  const text = button.closest('section').querySelector('pre');
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    // Browsers keep the clipboard for pages of this machine or over https.
    getSelection().selectAllChildren(text);
    document.execCommand('copy');
  }
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
});
