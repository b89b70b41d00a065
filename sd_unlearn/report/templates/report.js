"use strict";
/* Adds sorting, filtering and comparing. The page is complete without it, and it loads nothing. */
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const one = (query, root = document) => root.querySelector(query);
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  /* -- light and dark -- */
  const theme = one("#theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  dark.addEventListener("change", showTheme);
  showTheme();

  /* -- the comparison: sort by a column, filter by concept, verdict and name -- */
  const table = one("#compare-table");
  if (table) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const status = one("#compare-status");
    const controls = one("#compare-controls");
    const sortBy = one("#sort-by");
    controls.hidden = false;

    const valueOf = (row, column) => row.cells[column].dataset.value ?? "";
    const compare = (a, b) => {
      const x = Number(a), y = Number(b);
      return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
    };
    const sort = (column, direction) => {
      const sign = direction === "descending" ? -1 : 1;
      const rows = [...body.rows].sort((a, b) => {
        const x = valueOf(a, column), y = valueOf(b, column);
        if (x === "" || y === "") return (x === "") - (y === ""); /* lines without a value stay last */
        return sign * compare(x, y);
      });
      body.append(...rows);
      heads.forEach((head, i) => i === column ? head.setAttribute("aria-sort", direction) : head.removeAttribute("aria-sort"));
      status.textContent = `Sorted by ${heads[column].textContent}, ${direction}. ${shown()}`;
      sortBy.value = String(column);
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      const first = head.dataset.first || "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      button.addEventListener("click", () => sort(column, head.getAttribute("aria-sort") === first ? other : first));
      sortBy.append(new Option(head.textContent, String(column)));
    });
    sortBy.selectedIndex = -1;
    sortBy.addEventListener("change", () => heads[Number(sortBy.value)].firstChild.click());

    const fields = all("[data-filter]", controls);
    const shown = () => {
      const left = [...body.rows].filter((row) => !row.hidden && !row.classList.contains("alone")).length;
      return `${left} of ${plural([...body.rows].filter((row) => !row.classList.contains("alone")).length, "line")} shown.`;
    };
    const filter = () => {
      for (const row of body.rows) {
        row.hidden = fields.some(({ value, dataset }) => {
          const wanted = value.trim().toLowerCase();
          const own = row.dataset[dataset.filter].toLowerCase();
          return wanted !== "" && (dataset.filter === "text" ? !own.includes(wanted) : own !== wanted);
        });
      }
      status.textContent = shown();
    };
    for (const type of ["input", "change"]) fields.forEach((field) => field.addEventListener(type, filter));
    filter();
  }

  /* -- the pairs: filter, box and blur faces, hold to compare -- */
  const pairs = one("#pairs");
  if (pairs) {
    const controls = one("#pair-controls");
    const status = one("#pair-status");
    const shots = all(".shot[data-subject]", pairs);
    const selects = all("select[data-filter]", controls);
    const wanted = (name) => selects.find((s) => s.dataset.filter === name)?.value ?? "";
    controls.hidden = false;

    const filter = () => {
      const outcome = one("input[name=outcome]:checked", controls).value;
      const subject = wanted("subject"), concept = wanted("concept"), group = wanted("group");
      const active = Boolean(outcome || subject || concept || group);
      let left = 0;
      for (const shelf of all(".shelf", pairs)) {
        const fits = (!concept || shelf.dataset.concept === concept) && (!group || shelf.dataset.group === group);
        let any = false;
        for (const card of all(".pair", shelf)) {
          let some = false;
          for (const shot of all(".shot[data-subject]", card)) {
            const good = fits && (!outcome || shot.dataset.outcome === outcome) && (!subject || shot.dataset.subject === subject);
            shot.hidden = !good;
            some ||= good;
            left += good;
          }
          card.hidden = !some;
          any ||= some;
        }
        shelf.hidden = !any;
        const rest = one("details", shelf);
        if (rest) {
          const more = all(".pair", rest).filter((card) => !card.hidden).length;
          rest.hidden = more === 0;
          one("summary", rest).textContent = `${more.toLocaleString("en")} more`;
          if (active) rest.open = true;
        }
      }
      one("#no-pairs").hidden = left > 0;
      status.textContent = `${left.toLocaleString("en")} of ${plural(shots.length, "pair")} shown.`;
      const current = one("button.frame[tabindex='0']", pairs);
      if (current && current.offsetParent === null) moveTabStop(frames().find((f) => f.offsetParent !== null));
    };
    controls.addEventListener("change", (event) => {
      if (event.target.id === "boxes") pairs.classList.toggle("unboxed", !event.target.checked);
      else if (event.target.id === "blur") pairs.classList.toggle("blurred", event.target.checked);
      else filter();
    });
    for (const link of all("a[data-show]")) {
      link.addEventListener("click", () => {
        one(`input[name=outcome][value=${link.dataset.show}]`, controls).checked = true;
        for (const select of selects) select.value = "";
        filter();
      });
    }

    /* The image of a LoRA becomes a button; while it is held, the image of the base covers it. */
    const frames = () => all("button.frame", pairs);
    const moveTabStop = (to, focus = false) => {
      if (!to) return;
      for (const frame of all("button.frame[tabindex='0']", pairs)) frame.tabIndex = -1;
      to.tabIndex = 0;
      if (focus) {
        to.focus({ preventScroll: true });
        to.scrollIntoView({ block: "nearest" });
      }
    };
    const press = (frame) => {
      if (frame.classList.contains("held")) return;
      const base = one(".shot.base", frame.closest(".pair"));
      const copy = one("img", base).cloneNode();
      copy.alt = "";
      const over = document.createElement("span");
      over.className = "over";
      over.append(copy, ...all(".face", base).map((face) => face.cloneNode()));
      frame.append(over);
      frame.classList.add("held");
      frame.setAttribute("aria-pressed", "true");
      one("#pair-side").textContent = one("img", base).alt;
    };
    const release = (frame) => {
      one(".over", frame)?.remove();
      frame.classList.remove("held");
      frame.setAttribute("aria-pressed", "false");
      one("#pair-side").textContent = "";
    };
    for (const shot of shots) {
      const plain = one(".frame", shot);
      if (!plain || !one(".shot.base img", shot.closest(".pair"))) continue;
      const frame = document.createElement("button");
      frame.type = "button";
      frame.className = "frame";
      frame.tabIndex = -1;
      frame.setAttribute("aria-pressed", "false");
      frame.setAttribute("aria-label", `${one("img", plain).alt}. Hold to see it without the LoRA.`);
      frame.append(...plain.childNodes);
      plain.replaceWith(frame);
    }
    moveTabStop(frames()[0]);
    const frameOf = (event) => event.target.closest?.("button.frame");
    const onFrame = (type, act) => pairs.addEventListener(type, (event) => {
      const frame = frameOf(event);
      if (frame) act(frame, event);
    });
    onFrame("pointerdown", (frame, event) => {
      if (event.button !== 0) return;
      moveTabStop(frame);
      press(frame);
    });
    for (const type of ["pointerup", "pointercancel", "pointerout", "focusout"]) {
      onFrame(type, (frame, event) => {
        if (type !== "pointerout" || !frame.contains(event.relatedTarget)) release(frame);
      });
    }
    onFrame("contextmenu", (frame, event) => { if (frame.classList.contains("held")) event.preventDefault(); });
    onFrame("dragstart", (frame, event) => event.preventDefault());
    onFrame("keydown", (frame, event) => {
      if (event.key === " " || event.key === "Enter") {
        event.preventDefault(); /* Space would scroll the page */
        press(frame);
        return;
      }
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step && event.key !== "Home" && event.key !== "End") return;
      event.preventDefault();
      const seen = frames().filter((other) => other.offsetParent !== null);
      const next = event.key === "Home" ? 0 : event.key === "End" ? seen.length - 1 : seen.indexOf(frame) + step;
      moveTabStop(seen[next], true);
    });
    onFrame("keyup", (frame, event) => {
      if (event.key === " " || event.key === "Enter") { event.preventDefault(); release(frame); }
    });
    filter();
  }

  /* -- printing unfolds everything -- */
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    for (const details of folded) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
})();
