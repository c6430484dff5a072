// What is wider than the page scrolls sideways: let the keyboard reach it. The theme
// does this when the page opens and a while after a resize; formulas, fonts and folded
// cells come later, and the keyboard should not have to wait.
(function () {
  const WIDE =
    '.bd-article pre, .bd-article mjx-container[display="true"], ' +
    ".bd-article .cell_output > .output, .pst-scrollable-table-container";

  function mark() {
    for (const box of document.querySelectorAll(WIDE)) {
      const scrolls = box.scrollWidth > box.clientWidth + 1;
      if (scrolls) box.setAttribute("tabindex", "0");
      else if (box.getAttribute("tabindex") === "0") box.removeAttribute("tabindex");
    }
  }

  window.addEventListener("load", function () {
    mark();
    const typeset = window.MathJax && window.MathJax.startup;
    if (typeset && typeset.promise) typeset.promise.then(mark);
    document.fonts.ready.then(mark);
  });
  window.addEventListener("resize", mark);
  document.addEventListener("toggle", mark, true); // <details> does not bubble
  document.addEventListener("click", () => window.setTimeout(mark, 0));
})();
