// A formula wider than the page scrolls sideways: let the keyboard reach it.
(function () {
  function mark() {
    for (const box of document.querySelectorAll('mjx-container[display="true"]')) {
      if (box.scrollWidth > box.clientWidth + 1) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    }
  }
  window.addEventListener("load", function () {
    const typeset = window.MathJax && window.MathJax.startup;
    if (!typeset || !typeset.promise) return;
    typeset.promise.then(mark);
    window.addEventListener("resize", mark);
  });
})();
