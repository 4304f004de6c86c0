// The WCAG contrast ratio of every text that is seen in a document (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio): text nodes,
// what stands in fields, placeholders, and the words of ::before and ::after. Known by its ancestors' colours and opacities alone:
// text over a background image has ratio 0, for nobody can tell.
() => {
  const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const colour = text => {  // whatever its syntax, as red, green, blue and alpha
    if (!known.has(text)) {
      pen.clearRect(0, 0, 1, 1);
      pen.fillStyle = text;
      pen.fillRect(0, 0, 1, 1);
      const [red, green, blue, alpha] = pen.getImageData(0, 0, 1, 1).data;
      known.set(text, [red, green, blue, alpha / 255]);
    }
    return known.get(text);
  };
  const over = (top, under) => {
    const alpha = top[3] + under[3] * (1 - top[3]);
    return [0, 1, 2].map(i => alpha ? (top[i] * top[3] + under[i] * under[3] * (1 - top[3])) / alpha : 0).concat(alpha);
  };
  const luminance = pixel => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
    const level = pixel[i] / 255;
    return sum + share * (level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4);
  }, 0);
  const shown = (styles, pixel) => {  // of an element and its ancestors, from the inside
    let unknown = false;
    for (const style of styles) {
      unknown ||= pixel[3] < 1 && style.backgroundImage !== 'none';
      pixel = over(pixel, colour(style.backgroundColor));
      pixel = [...pixel.slice(0, 3), pixel[3] * Number(style.opacity)];
    }
    return [over(pixel, [255, 255, 255, 1]), unknown];
  };
  const found = [];
  const judge = (element, style, text, pseudo) => {
    const box = element.getBoundingClientRect();
    if (!element.checkVisibility({visibilityProperty: true}) || box.width < 2 || box.height < 2) return;
    const size = parseFloat(style.fontSize);
    if (!size) return;
    const styles = pseudo ? [style] : [];
    for (let one = element; one; one = one.parentElement) styles.push(getComputedStyle(one));
    const [letter] = shown(styles, colour(style.color)), [ground, unknown] = shown(styles, [0, 0, 0, 0]);
    const [dark, bright] = [letter, ground].map(luminance).sort((a, b) => a - b);
    found.push({
      text: text.trim().slice(0, 40), ratio: unknown ? 0 : (bright + 0.05) / (dark + 0.05),
      least: size >= 24 || size >= 18.66 && Number(style.fontWeight) >= 700 ? 3 : 4.5, element: element.outerHTML.slice(0, 120),
    });
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (texts.currentNode.data.trim()) judge(element, getComputedStyle(element), texts.currentNode.data);
  }
  const fields = 'textarea, input:not([type=range], [type=checkbox], [type=radio], [type=file])';
  for (const element of document.querySelectorAll(fields)) {
    if (element.value) judge(element, getComputedStyle(element), element.value);
    else if (element.placeholder) judge(element, getComputedStyle(element, '::placeholder'), element.placeholder);
  }
  for (const element of document.body.querySelectorAll('*')) {
    for (const name of ['::before', '::after']) {
      const style = getComputedStyle(element, name);
      if (style.display !== 'none' && /^".*\w/.test(style.content)) judge(element, style, style.content, true);
    }
  }
  return found;
}
