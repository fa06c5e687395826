// Scroll through the notebook of `count` cells that JupyterLab shows and measure each, once drawn.
// Returns one entry per cell: its index, its number of outputs, what is too wide, what was shrunk.
//
// JupyterLab breaks lines of text output, even inside words, and shrinks images: neither is ever
// wider than its place. So a line is measured as if it were not broken, and an image against the
// size that it was stored with. Cells out of sight are not drawn, so we measure what is in sight.
async count => {
    const ROUNDING = 1;                         // pixels
    const panel = document.querySelector(
        ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer");
    const measured = new Map();
    const all = (place, selector) => [...place.querySelectorAll(selector)];
    const frame = () => new Promise(requestAnimationFrame);

    function inSight(cell) {
        const box = cell.getBoundingClientRect(), view = panel.getBoundingClientRect();
        return box.height > 0 && box.bottom > view.top && box.top < view.bottom;
    }

    // Whether MathJax still has to set a formula: its dollars stand in the text.
    function hasRawFormula(cell) {
        for (const place of all(cell, ".jp-RenderedHTMLCommon")) {
            const texts = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
            while (texts.nextNode()) {
                const text = texts.currentNode;
                if (/\$[^$]+\$/.test(text.data) && !text.parentElement.closest("code")) return true;
            }
        }
        return false;
    }

    function isDrawn(cell) {
        const markdown = cell.classList.contains("jp-MarkdownCell");
        const content = cell.querySelector(markdown ? ".jp-RenderedMarkdown > *" : ".cm-line");
        const images = all(cell, ".jp-OutputArea-output img, .jp-RenderedMarkdown img");
        const outputs = all(cell, ".jp-OutputArea-output:not(.lm-mod-hidden)");
        return content !== null && !hasRawFormula(cell) && images.every(image => image.complete)
            && outputs.every(output => output.childNodes.length > 0);
    }

    // The cells in sight, as soon as all of them are drawn; after five seconds those that are.
    async function drawnCells() {
        let cells = [];
        for (const end = performance.now() + 5000; performance.now() < end;) {
            await frame();
            await frame();
            cells = all(panel, ".jp-Cell").filter(inSight);
            if (cells.every(isDrawn)) break;
        }
        return cells.filter(isDrawn);
    }

    function unbrokenWidth(text) {
        const parts = [text, ...all(text, "*")];
        parts.forEach(part => part.style.setProperty("white-space", "pre", "important"));
        const width = text.scrollWidth;
        parts.forEach(part => part.style.removeProperty("white-space"));
        return width;
    }

    // How wide the place would have to be for all that it holds: tables, formulas, widgets.
    function neededWidth(place) {
        const left = place.getBoundingClientRect().left;
        const held = all(place, ":not(svg *, mjx-assistive-mml, mjx-assistive-mml *)");
        const boxes = held.map(each => each.getBoundingClientRect()).filter(box => box.width > 0);
        return Math.max(place.scrollWidth, ...boxes.map(box => Math.round(box.right - left)));
    }

    function shrunkImages(cell) {
        const images = all(cell, ".jp-RenderedImage img, .jp-RenderedHTMLCommon img");
        const stored = image => Number(image.getAttribute("width")) || image.naturalWidth;
        return images.filter(image => stored(image) > 1.02 * image.clientWidth)
            .map(image => `image of ${stored(image)} shown in ${image.clientWidth} pixels`);
    }

    function measure(cell) {
        const wide = [];
        const check = (what, needed, place) => {
            if (needed > place.clientWidth + ROUNDING) {
                wide.push(`${what} of ${needed} in ${place.clientWidth} pixels`);
            }
        };
        if (cell.classList.contains("jp-CodeCell")) {
            const editor = cell.querySelector(".cm-scroller");
            check("code", editor.scrollWidth, editor);
        }
        const outputs = all(cell, ".jp-OutputArea-output");
        all(cell, ".jp-MarkdownOutput").forEach(place => check("text", neededWidth(place), place));
        outputs.forEach(place => check("output", neededWidth(place), place));
        all(cell, ".jp-RenderedText pre, .jp-RenderedHTMLCommon pre")
            .forEach(text => check("line", unbrokenWidth(text), text));
        return {outputs: outputs.length, wide, shrunk: shrunkImages(cell)};
    }

    // From top to bottom, where JupyterLab may still be adding cells.
    async function scrollThrough() {
        panel.scrollTop = 0;
        for (let waits = 0; waits < 20 && measured.size < count;) {
            const before = panel.scrollTop;
            for (const cell of await drawnCells()) {
                const index = Number(cell.dataset.windowedListIndex);
                if (!measured.has(index)) measured.set(index, {index, ...measure(cell)});
            }
            panel.scrollTop += 0.9 * panel.clientHeight;
            waits = panel.scrollTop > before ? 0 : waits + 1;
            if (waits > 0) await new Promise(resolve => setTimeout(resolve, 100));
        }
    }

    const end = performance.now() + 120000;     // a busy machine draws slowly
    while (measured.size < count && performance.now() < end) await scrollThrough();
    panel.scrollTop = 0;
    return [...measured.values()];
}
